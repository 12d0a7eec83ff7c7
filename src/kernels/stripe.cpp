#include "stripe.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <stdexcept>

namespace headwater {
namespace {

constexpr int64_t kDeletedMin = 4096;  // ids
constexpr int64_t kGrowMin = 16 << 10;  // bytes
constexpr int64_t kGrowPart = 32;       // rows grow by this part: so little is in use by nobody
constexpr size_t kNeighbours = 8;
constexpr uint32_t kRowsAhead = 4;

}  // namespace

uint32_t decayed_count(uint32_t count, double factor, uint64_t times) {
  for (; times > 0 && count > 0; times--) count = static_cast<uint32_t>(std::floor(count * factor));
  return count;
}

// ---- candidates ----------------------------------------------------------------------------------------------

size_t Candidates::find(int64_t id, uint64_t hash) const {
  size_t place = home(hash);
  while (entries_[place].last != kNone && entries_[place].id != id) place = (place + 1) & (entries_.size() - 1);
  return place;
}

uint32_t Candidates::last_seen(int64_t id, uint64_t hash) const { return entries_.empty() ? kNone : entries_[find(id, hash)].last; }

void Candidates::forget(int64_t id, uint64_t hash) {
  if (entries_.empty()) return;
  const size_t place = find(id, hash);
  if (entries_[place].last != kNone) remove(place);
}

void Candidates::remove(size_t place) {
  const size_t mask = entries_.size() - 1;
  used_--;
  for (size_t next = (place + 1) & mask; entries_[next].last != kNone; next = (next + 1) & mask) {
    // An entry may move back to the hole unless its home lies after the hole.
    const size_t from = home(hash_of(entries_[next].id));
    if (((next - from) & mask) >= ((next - place) & mask)) {
      entries_[place] = entries_[next];
      place = next;
    }
  }
  entries_[place] = {0, kNone, 0};
}

void Candidates::grow(size_t places) {
  std::vector<Entry> old(places, Entry{0, kNone, 0});
  old.swap(entries_);
  for (const Entry& entry : old) {
    if (entry.last != kNone) entries_[find(entry.id, hash_of(entry.id))] = entry;
  }
}

uint32_t Candidates::see(int64_t id, uint64_t hash, uint32_t clock, int64_t bytes_max) {
  size_t place = entries_.empty() ? 0 : find(id, hash);
  if (entries_.empty() || entries_[place].last == kNone) {
    if (used_ + 1 > entries_.size() / 4 * 3) {
      const size_t places = std::max<size_t>(16, 2 * entries_.size());
      if (bytes() + static_cast<int64_t>(places * sizeof(Entry)) <= bytes_max) grow(places);
      else if (entries_.empty()) return kSighting;  // not even room for a few
      place = find(id, hash);
    }
    if (used_ + 1 > entries_.size() / 4 * 3) {
      size_t worst = kNone;
      for (size_t i = 0, at = home(hash); i < kNeighbours || worst == kNone; i++, at = (at + 1) & (entries_.size() - 1)) {
        const Entry& entry = entries_[at];
        if (entry.last == kNone) continue;
        const bool is_worse = worst == kNone || entry.count < entries_[worst].count ||
                              (entry.count == entries_[worst].count && entry.last < entries_[worst].last);
        if (is_worse) worst = at;
      }
      remove(worst);
      place = find(id, hash);
    }
    entries_[place] = Entry{id, clock, 0};
    used_++;
  }
  Entry& entry = entries_[place];
  entry.last = clock;
  entry.count = std::min(entry.count + kSighting, kCountMax);
  return entry.count;
}

void Candidates::decay(double factor, uint64_t times) {
  for (Entry& entry : entries_) entry.count = decayed_count(entry.count, factor, times);
}

// ---- index ---------------------------------------------------------------------------------------------------

void Stripe::init(const Shape* shape, int number) {
  shape_ = shape;
  number_ = number;
  lines_.reset(static_cast<Line*>(take_zeroed(sizeof(Line))));
  if (lines_ == nullptr) throw std::bad_alloc();
  line_count_ = 1;
}

void Stripe::add_to_index(uint32_t hash, uint32_t number) {
  for (int64_t at = home(hash);; at = next(at)) {
    Line& line = lines_[at];
    for (uint32_t& slot : line.slots) {
      if (slot != 0) continue;
      slot = tag_of(hash) | number;
      return;
    }
    line.passed++;
  }
}

// Where a number is. passes: it is going, so those that it has passed need not count it any longer.
uint32_t* Stripe::slot_of(uint32_t hash, uint32_t number, bool passes) {
  const uint32_t wanted = tag_of(hash) | number;
  for (int64_t at = home(hash);; at = next(at)) {
    Line& line = lines_[at];
    for (uint32_t& slot : line.slots) {
      if (slot == wanted) return &slot;
    }
    line.passed -= passes;
  }
}

int64_t Stripe::lines_for(int64_t entries) const {
  // With rows on disk most of a budget is the index, so it grows by less; making it anew is little beside what the disk takes.
  const int64_t part = shape_->spill_base == kNone ? 4 : 16;
  int64_t lines = line_count_;
  while (entries > lines * kLineRows) {
    const int64_t more = lines + lines / part + 1;
    // Stripes set out from different sizes, so that they do not all grow in the same push, nor are all nearly empty after it.
    lines = lines < 64 && more >= 64 ? 64 + number_ % 16 : more;
  }
  return lines;
}

bool Stripe::grow_index() {
  const int64_t lines = std::min(lines_for(entries() + 1), shape_->lines_max);
  if (lines <= line_count_ || charged() + (lines - line_count_) * static_cast<int64_t>(sizeof(Line)) > shape_->quota) return false;
  make_index(lines);
  return true;
}

// Made anew from the rows. The old one is kept until then, unless both are more than the quota.
void Stripe::make_index(int64_t lines) {
  const int64_t bytes = lines * static_cast<int64_t>(sizeof(Line));
  if (charged() + bytes > shape_->quota) lines_.reset();
  Line* fresh = static_cast<Line*>(take_zeroed(bytes));
  if (fresh == nullptr) {
    if (lines_ == nullptr && lines > line_count_) make_index(line_count_);
    throw std::bad_alloc();
  }
  lines_.reset(fresh);
  line_count_ = lines;
  // A number is below the most rows that there ever were, or that of a place on disk.
  const int64_t places = shape_->spill_base == kNone ? 0 : number_of(units() + 1, 0);
  while (numbers_ < std::max(lines * kLineRows, places)) number_bits_++, numbers_ = numbers_ << 1 | 1;

  constexpr uint32_t kAhead = 8;
  uint64_t hashes[kAhead];
  for (uint32_t n = 0; n < used_ + kAhead; n++) {
    if (n >= kAhead && !row(n - kAhead)->is_free()) add_to_index(short_of(hashes[n % kAhead]), n - kAhead);
    if (n >= used_) continue;
    if (n + 3 * kAhead < used_) __builtin_prefetch(row(n + 3 * kAhead));
    hashes[n % kAhead] = hash_of(row(n)->id);
    ask_for_line(hashes[n % kAhead]);
  }
  for (uint32_t u = 0; u < units(); u++) {
    for (int64_t place = 0; place < shape_->unit_rows && units_[u].live > 0; place++) {
      if (units_[u].hashes[place] != 0) add_to_index(units_[u].hashes[place], number_of(u, place));
    }
  }
}

// ---- rows ----------------------------------------------------------------------------------------------------

int64_t Stripe::bytes() const {
  return charged() + static_cast<int64_t>(deleted.capacity() * sizeof(int64_t)) + candidates.bytes();
}

// What counts against the quota.
int64_t Stripe::charged() const {
  return line_count_ * static_cast<int64_t>(sizeof(Line)) + range_.bytes() + units_bytes();
}

bool Stripe::grow_rows() {
  if (capacity_ == shape_->rows_max) {
    if (shape_->quota < INT64_MAX / 2) return false;
    throw std::length_error("Expected at most 33,554,432 rows in each stripe of a table: use more servers or a budget.");
  }
  const int64_t least = Range::whole_pages((capacity_ + 1) * shape_->row_bytes), room = shape_->quota - charged();
  int64_t wanted = range_.bytes() + std::max(kGrowMin, range_.bytes() / kGrowPart);
  if (range_.bytes() / kGrowPart >= Range::kHugePage) wanted += Range::kHugePage - wanted % Range::kHugePage;  // which come at once
  const bool spills = shape_->spill_base != kNone;
  if (spills && least > range_.bytes() + room) return false;
  // Ahead of its use no more than rows can need, nor what is kept for pages that are written.
  const int64_t spare = room - (spills ? kPagesAhead * unit_cost() : 0);
  int64_t most = std::min(range_.limit(), range_.bytes() + std::max<int64_t>(0, spare) / Range::kPage * Range::kPage);
  most = std::min(most, Range::whole_pages(shape_->rows_max * shape_->row_bytes));
  range_.grow(std::max(least, std::min(wanted, most)));
  capacity_ = std::min(range_.bytes() / shape_->row_bytes, shape_->rows_max);
  return true;
}

// A macro's work: the compiler takes a function that only prefetches for one that does nothing.
__attribute__((always_inline)) inline void Stripe::ask_for(const Header* row) const {
  const char* start = reinterpret_cast<const char*>(row);
  for (int64_t at = 0; at < std::min(shape_->row_bytes, kRowBytesAhead); at += 64) __builtin_prefetch(start + at, 1);
}

void Stripe::draw_rows() {
  for (int i = 0; i < kDraws; i += 2) {
    const uint64_t bits = mix64(shape_->seed ^ mix64((static_cast<uint64_t>(number_) << 56) + draws_++));
    drawn_[i] = static_cast<uint32_t>((bits & 0xffffffffu) * used_ >> 32);
    drawn_[i + 1] = static_cast<uint32_t>((bits >> 32) * used_ >> 32);
  }
  for (uint32_t number : drawn_) __builtin_prefetch(row(number));
}

uint64_t Stripe::worth(const Header* row) const {
  const uint64_t last = row->last, count = row->count();
  return shape_->victim == Victim::lru ? last << 24 | count : count << 32 | last;
}

// The worst quarter of those that were drawn go next. Then others are drawn: they come from memory while these are used up.
void Stripe::choose_victims() {
  struct Key {
    uint64_t key;
    uint32_t number;
  };
  Key keys[kDraws];
  int count = 0;
  for (uint32_t number : drawn_) {
    const Header* header = row(number);
    if (header->is_free()) continue;
    keys[count++] = {worth(header), number};
  }
  const int wanted = std::min(count, kVictims);
  std::partial_sort(keys, keys + wanted, keys + count, [](const Key& a, const Key& b) { return a.key < b.key; });
  for (victim_count_ = 0; victim_count_ < wanted; victim_count_++) {
    const uint32_t number = keys[wanted - 1 - victim_count_].number;  // the worst comes last, and goes first
    victims_[victim_count_] = {number, row(number)->last};
    ask_for_line(hash_of(row(number)->id));
    ask_for(row(number));
  }
  draw_rows();
}

void Stripe::make_room() {
  if (draws_ == 0) draw_rows();
  for (;;) {
    while (victim_count_ == 0) choose_victims();
    const auto [number, last] = victims_[--victim_count_];
    Header* header = row(number);
    if (header->is_free() || header->last != last) continue;  // gone or seen since it was chosen, or drawn twice
    remove({number, header});
    evicted++;
    return;
  }
}

Found Stripe::insert(uint64_t hash, int64_t id, uint32_t clock) {
  const bool has_row = free_ != kNone || used_ < capacity_ || grow_rows();
  const bool has_slot = entries() < line_count_ * kLineRows || grow_index();
  if ((!has_row || !has_slot) && shape_->spill_base != kNone) throw std::logic_error("Expected room for a row, which was made before.");
  if (!has_row || !has_slot) make_room();
  Found found;
  if (free_ != kNone) {
    found = {free_, row(free_)};
    free_ = static_cast<uint32_t>(found.row->id);
  } else {
    found = {used_, row(used_)};
    used_++;
  }
  add_to_index(short_of(hash), found.number);
  rows_++;
  // The rows that come next, for they are written soon and come from far away.
  const uint32_t ahead = used_ + kRowsAhead;
  if (ahead < capacity_) ask_for(row(ahead));
  found.row->id = id;
  found.row->last = clock;
  found.row->marks = 0;
  return found;
}

void Stripe::log_deleted(int64_t id) {
  if (shape_->followers == 0) return;
  const int64_t limit = shape_->deleted_max >= 0 ? shape_->deleted_max : std::max(kDeletedMin, entries() / 8);
  if (static_cast<int64_t>(deleted.size()) >= limit) {
    const size_t older = (deleted.size() + 1) / 2;
    deleted_start += older;
    deleted.erase(deleted.begin(), deleted.begin() + static_cast<int64_t>(older));
  }
  if (deleted.capacity() == 0 && shape_->deleted_max >= 0) deleted.reserve(static_cast<size_t>(limit));
  if (limit > 0) deleted.push_back(id);
  else deleted_start++;
}

void Stripe::free_row(Found found) {
  found.row->last = kNone;
  found.row->id = free_;
  free_ = found.number;
  rows_--;
}

void Stripe::remove(Found found) {
  log_deleted(found.row->id);
  remove_from_index(short_of(hash_of(found.row->id)), found.number);
  free_row(found);
}

void Stripe::decay(double factor, uint64_t period) {
  if (factor < 1.0 && period > decayed_) {
    for (uint32_t n = 0; n < used_; n++) {
      Header* header = row(n);
      if (!header->is_free()) header->set_count(decayed_count(header->count(), factor, period - decayed_));
    }
    candidates.decay(factor, period - decayed_);
  }
  decayed_ = std::max(decayed_, period);
}

}  // namespace headwater
