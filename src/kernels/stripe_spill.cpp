// A stripe's rows that lie on disk. Nothing here reads or writes the disk itself.

#include <algorithm>
#include <new>
#include <stdexcept>

#include "stripe.h"

namespace headwater {
namespace {

constexpr int64_t kPlacesMax = 1 << 26;  // of a stripe
constexpr int64_t kMallocBytes = 16;     // that malloc adds
constexpr int kSparseDraws = 8;

}  // namespace

int64_t Stripe::unit_cost() const {
  return static_cast<int64_t>(sizeof(Unit)) + kMallocBytes + shape_->unit_rows * static_cast<int64_t>(sizeof(uint32_t));
}

int64_t Stripe::units_bytes() const {
  const int64_t held = static_cast<int64_t>(units_.size() - free_units_.size());
  return held * unit_cost() + static_cast<int64_t>(free_units_.size() * sizeof(Unit) + free_units_.capacity() * sizeof(uint32_t));
}

// ---- room ----------------------------------------------------------------------------------------------------

// What the rows that leave will cost on disk is part of the sum, so it is found step by step.
int64_t Stripe::rows_over(int64_t rows, int64_t entries_more) const {
  const int64_t growth = lines_for(entries() + entries_more) - line_count_;
  int64_t over = 0, pages = 0;
  for (;;) {
    const int64_t left = shape_->quota - charged() - growth * static_cast<int64_t>(sizeof(Line)) - (pages + kPagesAhead) * unit_cost();
    const int64_t bytes = std::max<int64_t>(0, range_.bytes() + left) / Range::kPage * Range::kPage;
    over = std::max<int64_t>(0, rows_ + rows - std::min(bytes / shape_->row_bytes, shape_->rows_max));
    const int64_t needed = (2 * over + shape_->unit_rows - 1) / shape_->unit_rows;  // a page takes half a unit of rows at least
    if (needed <= pages) return over;
    pages = needed;
  }
}

void Stripe::settle_room(int64_t entries_more) {
  const int64_t lines = lines_for(entries() + entries_more);
  const int64_t growth = (lines - line_count_) * static_cast<int64_t>(sizeof(Line));
  const int64_t over = charged() + growth + kPagesAhead * unit_cost() - shape_->quota;
  if (over > 0) shrink_rows(std::max(rows_, std::max<int64_t>(0, range_.bytes() - Range::whole_pages(over)) / shape_->row_bytes));
  if (lines > line_count_) make_index(lines);
}

// So that rows have numbers below `capacity`, and the pages past them are nobody's.
void Stripe::shrink_rows(int64_t capacity) {
  const uint32_t limit = static_cast<uint32_t>(capacity);
  std::vector<uint32_t> holes;
  for (uint32_t n = 0; n < std::min(used_, limit); n++) {
    if (row(n)->is_free()) holes.push_back(n);
  }
  for (uint32_t n = limit; n < used_; n++) {
    if (row(n)->is_free()) continue;
    const uint32_t to = holes.back();
    holes.pop_back();
    std::memcpy(static_cast<void*>(row(to)), row(n), static_cast<size_t>(shape_->row_bytes));
    replace_in_index(short_of(hash_of(row(to)->id)), n, to);
  }
  used_ = std::min(used_, limit);
  free_ = kNone;
  for (uint32_t n : holes) {
    if (n >= used_) continue;
    row(n)->last = kNone;
    row(n)->id = free_;
    free_ = n;
  }
  range_.shrink(capacity * shape_->row_bytes);
  capacity_ = std::min(range_.bytes() / shape_->row_bytes, shape_->rows_max);
}

// ---- out -----------------------------------------------------------------------------------------------------

// Of many that are drawn, or, when too few of them may go, of all.
Page Stripe::choose_page(int64_t wanted) {
  Page page;
  const int64_t held = static_cast<int64_t>(units_.size()) - static_cast<int64_t>(free_units_.size());
  if ((held - 2) * shape_->unit_rows * 5 > spilled_ * 7) {  // less than five places of seven are somebody's
    for (int i = 0; i < kSparseDraws; i++) {
      const uint32_t drawn = static_cast<uint32_t>((mix64(shape_->seed ^ draws_++) & 0xffffffffu) * units_.size() >> 32);
      const Unit& unit = units_[drawn];
      const bool fits = unit.live > 0 && unit.live <= shape_->unit_rows / 2 && !unit.is_moving;
      if (fits && (page.moved == kNone || unit.live < units_[page.moved].live)) page.moved = drawn;
    }
  }
  const int64_t room = shape_->unit_rows - (page.moved == kNone ? 0 : units_[page.moved].live);
  const int64_t count = std::min(room, std::max(wanted, std::min(room, rows_ / 4)));
  const auto may_go = [this](uint32_t n, uint32_t marks) { return !row(n)->is_free() && !(row(n)->marks & marks); };
  std::vector<uint32_t> found;
  for (int64_t i = 0; i < 4 * count && used_ > 0; i++) {
    const uint64_t bits = mix64(shape_->seed ^ mix64((static_cast<uint64_t>(number_) << 56) + draws_++));
    const uint32_t drawn = static_cast<uint32_t>((bits & 0xffffffffu) * used_ >> 32);
    if (may_go(drawn, kPinned | kWarm)) found.push_back(drawn);
  }
  std::sort(found.begin(), found.end());
  found.erase(std::unique(found.begin(), found.end()), found.end());
  if (static_cast<int64_t>(found.size()) < count) {
    found.clear();
    for (uint32_t n = 0; n < used_; n++) {
      if (!may_go(n, kPinned)) continue;
      row(n)->marks &= ~kWarm;  // they have had their time
      found.push_back(n);
    }
  }
  const size_t going = std::min(found.size(), static_cast<size_t>(count));
  std::nth_element(found.begin(), found.begin() + static_cast<int64_t>(going), found.end(),
                   [this](uint32_t a, uint32_t b) { return std::pair(worth(row(a)), a) < std::pair(worth(row(b)), b); });
  found.resize(going);
  if (found.empty()) return {};
  page.rows = std::move(found);
  for (uint32_t n : page.rows) row(n)->marks |= kPinned;
  if (page.moved != kNone) units_[page.moved].is_moving = true;
  return page;
}

void Stripe::drop_page(const Page& page) {
  for (uint32_t n : page.rows) row(n)->marks &= ~kPinned;
  if (page.moved != kNone) units_[page.moved].is_moving = false;
}

Header Stripe::header_now(uint32_t number, const Header* stored, double factor) const {
  const Unit& unit = unit_of(number);
  Header now = *stored;
  now.marks = decayed_count(stored->count(), factor, decayed_ - unit.period) << 8 |
              ((stored->marks & unit.valid) | unit.all);
  return now;
}

void Stripe::fill_page(const Page& page, const char* moved, char* buffer) const {
  char* to = buffer;
  const size_t bytes = static_cast<size_t>(shape_->row_bytes);
  if (page.moved != kNone) {
    const Unit& unit = units_[page.moved];
    for (int64_t place = 0; place < shape_->unit_rows; place++) {
      if (unit.hashes[place] == 0) continue;
      const Header* stored = reinterpret_cast<const Header*>(moved + place * shape_->row_bytes);
      const Header now = header_now(number_of(page.moved, place), stored, shape_->decay);
      std::memmove(to, stored, bytes);
      std::memcpy(to, &now, sizeof now);
      to += bytes;
    }
  }
  for (uint32_t n : page.rows) {
    std::memcpy(to, row(n), bytes);
    reinterpret_cast<Header*>(to)->marks &= ~(kPinned | kWarm);
    to += bytes;
  }
}

// The new unit's number; its place in the file is set by the caller.
uint32_t Stripe::new_unit() {
  auto hashes = std::make_unique<uint32_t[]>(static_cast<size_t>(shape_->unit_rows));
  if (free_units_.empty()) {
    const int64_t places = (units() + 1) * shape_->unit_rows;
    if (places > kPlacesMax) throw std::length_error("Expected at most 67,108,864 spilled rows in each stripe of a table: use more servers.");
    free_units_.reserve(units_.size() + 1 > free_units_.capacity() ? units_.size() + units_.size() / 2 + 8 : free_units_.capacity());
    units_.emplace_back();
    free_units_.push_back(units() - 1);
    if (number_of(units(), 0) > numbers_) make_index(line_count_);
  }
  const uint32_t unit = free_units_.back();
  free_units_.pop_back();
  units_[unit].hashes = std::move(hashes);
  return unit;
}

uint32_t Stripe::settle_page(const Page& page) {
  const uint32_t number = new_unit();
  Unit& unit = units_[number];
  unit.file = page.file;
  unit.generation++;
  unit.oldest = kNone;
  unit.period = static_cast<uint32_t>(decayed_);
  unit.valid = kOfConsumers;
  unit.all = unit.some = 0;
  unit.is_moving = false;
  int64_t place = 0;
  uint32_t freed = kNone;
  if (page.moved != kNone) {
    Unit& old = units_[page.moved];
    unit.oldest = old.oldest;
    unit.some = old.some | old.all;
    for (int64_t from = 0; from < shape_->unit_rows; from++) {
      if (old.hashes[from] == 0) continue;
      unit.hashes[place] = old.hashes[from];
      replace_in_index(old.hashes[from], number_of(page.moved, from), number_of(number, place++));
    }
    freed = old.file;
    old.hashes.reset();
    old.live = 0;
    free_units_.push_back(page.moved);
  }
  for (uint32_t n : page.rows) {
    Header* header = row(n);
    const uint32_t hash = short_of(hash_of(header->id));
    unit.oldest = std::min(unit.oldest, header->last);
    unit.some |= header->marks & kOfConsumers;
    unit.hashes[place] = hash;
    replace_in_index(hash, n, number_of(number, place++));
    free_row({n, header});
  }
  unit.live = static_cast<uint16_t>(place);
  spilled_ += static_cast<int64_t>(page.rows.size());
  written += static_cast<int64_t>(page.rows.size());
  return freed;
}

// ---- in ------------------------------------------------------------------------------------------------------

uint32_t Stripe::leave_place(uint32_t number) {
  Unit& unit = unit_of(number);
  unit.hashes[place_of(number)] = 0;
  spilled_--;
  if (--unit.live > 0) return kNone;
  unit.hashes.reset();
  free_units_.push_back(static_cast<uint32_t>((number - shape_->spill_base) / shape_->unit_rows));
  return unit.file;
}

uint32_t Stripe::bring_in(uint32_t number, const Header* stored, uint32_t marks, Found* found) {
  if (free_ == kNone && used_ == capacity_ && !grow_rows()) {
    throw std::logic_error("Expected room for a row from disk, which was made before.");
  }
  if (free_ != kNone) {
    *found = {free_, row(free_)};
    free_ = static_cast<uint32_t>(found->row->id);
  } else {
    *found = {used_, row(used_)};
    used_++;
  }
  rows_++;
  loaded++;
  std::memcpy(static_cast<void*>(found->row), stored, static_cast<size_t>(shape_->row_bytes));
  found->row->marks = marks;
  replace_in_index(unit_of(number).hashes[place_of(number)], number, found->number);
  return leave_place(number);
}

uint32_t Stripe::remove_spilled(uint32_t number, const Header* stored) {
  log_deleted(stored->id);
  remove_from_index(unit_of(number).hashes[place_of(number)], number);
  return leave_place(number);
}

}  // namespace headwater
