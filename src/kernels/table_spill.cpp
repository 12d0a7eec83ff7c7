// Rows on disk: who goes there, who comes back, and how a table reads them where they are.

#include <signal.h>

#include <algorithm>
#include <stdexcept>

#include "table.h"

namespace headwater {
namespace {

constexpr size_t kPagesAtOnce = 512;   // written side by side, over all stripes
constexpr int64_t kRoundIds = 2048;    // looked up before room is made for what was found
constexpr size_t kBatchesMax = 4;      // that wait to be brought in; then the oldest is forgotten

}  // namespace

struct Table::Need {
  Stripe* stripe;
  int64_t rows;     // that come into memory
  int64_t entries;  // of them new to the index
};

struct Table::Want {
  Stripe* stripe;
  uint32_t number;      // of the row on disk
  uint32_t generation;  // of its unit
  int64_t index;        // of the id
};

// Spilled rows, those of a unit together.
struct Table::Wants {
  const int64_t* ids;
  std::vector<Want> all;
  std::vector<size_t> ends;  // of each unit's

  size_t begin(int64_t unit) const { return unit == 0 ? 0 : ends[static_cast<size_t>(unit) - 1]; }
  size_t end(int64_t unit) const { return ends[static_cast<size_t>(unit)]; }

  // The rows that ids[index] may have on disk. Returns how many.
  int64_t add(Stripe& stripe, uint64_t hash, int64_t index) {
    const size_t before = all.size();
    stripe.each_spilled(hash, [&](uint32_t number) { all.push_back({&stripe, number, stripe.unit_of(number).generation, index}); });
    return static_cast<int64_t>(all.size() - before);
  }

  void sort(int64_t unit_rows, uint32_t base) {
    const auto unit_of = [&](const Want& want) { return std::pair(want.stripe, (want.number - base) / unit_rows); };
    std::sort(all.begin(), all.end(), [](const Want& a, const Want& b) {
      return std::tuple(a.stripe, a.number, a.index) < std::tuple(b.stripe, b.number, b.index);
    });
    ends.clear();
    for (size_t i = 0; i < all.size(); i++) {
      if (i + 1 == all.size() || unit_of(all[i]) != unit_of(all[i + 1])) ends.push_back(i + 1);
    }
  }
};

// ---- reading -------------------------------------------------------------------------------------------------

template <class Take>
void Table::read_wanted(const Wants& wants, Take take) {
  disk_->read(files_of(wants), [&](int64_t i, const char* buffer) {
    for (size_t w = wants.begin(i); w < wants.end(i); w++) {
      const Want& want = wants.all[w];
      const Header* stored = reinterpret_cast<const Header*>(buffer + want.stripe->place_of(want.number) * shape_.row_bytes);
      if (stored->id == wants.ids[want.index]) take(want, stored);
    }
  });
}

std::vector<uint32_t> Table::files_of(const Wants& wants) const {
  std::vector<uint32_t> files;
  for (size_t end : wants.ends) files.push_back(wants.all[end - 1].stripe->unit_of(wants.all[end - 1].number).file);
  return files;
}

void Table::read_units(const std::vector<std::pair<Stripe*, uint32_t>>& units, const std::function<void(int64_t, const char*)>& take) {
  std::vector<uint32_t> files;
  for (const auto& [stripe, unit] : units) files.push_back(stripe->unit(unit).file);
  disk_->read(files, take);
}

int64_t Table::pull_spilled(const int64_t* ids, const std::vector<int64_t>& which, float* out, bool touch, uint32_t clock) {
  int64_t hits = 0;
  const auto copy_out = [&](const Want& want, const Header* stored) {
    const float* values = reinterpret_cast<const float*>(stored + 1);
    std::copy(values, values + settings_.dim, out + want.index * settings_.dim);
    hits++;
  };
  const auto sorted_wants = [&](const std::vector<int64_t>& indexes) {
    Wants wants{ids, {}, {}};
    for (int64_t i : indexes) {
      const uint64_t hash = hash_of(ids[i]);
      wants.add(stripe_at(hash), hash, i);
    }
    wants.sort(shape_.unit_rows, shape_.spill_base);
    return wants;
  };
  if (!touch) {
    read_wanted(sorted_wants(which), [&](const Want& want, const Header* stored) {
      if (!has_expired(stored->last, clock)) copy_out(want, stored);
    });
    return hits;
  }

  for (size_t next = 0; next < which.size();) {
    std::vector<int64_t> round;
    int64_t rows[kStripesMax] = {};
    for (bool is_enough = false; next < which.size() && static_cast<int64_t>(round.size()) < kRoundIds && !is_enough; next++) {
      const int64_t i = which[next];
      const uint64_t hash = hash_of(ids[i]);
      Stripe& stripe = stripe_at(hash);
      // A repeated id may be in memory since an earlier round; it is taken now, for making room may drive it out again.
      const Found found = stripe.find(hash, ids[i]);
      if (found.row != nullptr) {
        std::copy(found.row->values(), found.row->values() + settings_.dim, out + i * settings_.dim);
        hits++;
        continue;
      }
      round.push_back(i);
      int64_t& more = rows[stripe_of(hash)];
      stripe.each_spilled(hash, [&](uint32_t) { more++; });
      is_enough = more > stripe.rows() / 4;
    }
    std::vector<Need> needs;
    for (int b = 0; b < settings_.stripes; b++) {
      if (rows[b] > 0) needs.push_back({&stripes_[static_cast<size_t>(b)], rows[b], 0});
    }
    make_room(needs);
    read_wanted(sorted_wants(round), [&](const Want& want, const Header* stored) {
      if (has_expired(stored->last, clock)) return;
      copy_out(want, stored);
      const uint64_t hash = hash_of(stored->id);
      if (want.stripe->find(hash, stored->id).row != nullptr) return;  // a repeated id
      Found found;
      give_unit(want.stripe->bring_in(want.number, stored, want.stripe->header_now(want.number, stored, settings_.decay).marks, &found));
      found.row->last = std::max(found.row->last, clock);
    });
  }
  return hits;
}

// ---- room ----------------------------------------------------------------------------------------------------

void Table::make_room(const std::vector<Need>& needs) {
  for (;;) {
    std::vector<std::pair<Stripe*, Page>> pages;
    const auto drop_all = [&] {
      for (auto& [stripe, page] : pages) {
        stripe->drop_page(page);
        give_unit(page.file);
      }
    };
    try {
      for (const Need& need : needs) {
        int64_t over = need.stripe->rows_over(need.rows, need.entries);
        for (int64_t i = 0; i < kPagesAhead && over > 0 && pages.size() < kPagesAtOnce; i++) {
          Page page = need.stripe->choose_page(over);
          if (page.rows.empty()) {
            if (i > 0) break;  // those of before had better be gone first
            throw std::invalid_argument("Expected fewer rows at once than a budget of " + std::to_string(settings_.budget_bytes) +
                                        " bytes holds beside what it costs to know the rows on disk: raise the budget or send smaller batches.");
          }
          over -= static_cast<int64_t>(page.rows.size());
          page.file = kNone;
          pages.emplace_back(need.stripe, std::move(page));
          pages.back().second.file = disk_->take();
        }
      }
      if (pages.empty()) break;
      disk_->run(static_cast<int64_t>(pages.size()), [&](int64_t i, int stage, char* buffer) -> std::optional<Disk::Step> {
        const auto& [stripe, page] = pages[static_cast<size_t>(i)];
        const int reads = page.moved != kNone;
        if (stage < reads) return Disk::Step{false, stripe->unit(page.moved).file};
        if (stage > reads) return std::nullopt;
        stripe->fill_page(page, buffer, buffer);
        return Disk::Step{true, page.file};
      });
    } catch (...) {
      drop_all();
      throw;
    }
    std::vector<Stripe*> settled;
    while (!pages.empty()) {
      auto& [stripe, page] = pages.back();
      try {
        give_unit(stripe->settle_page(page));
      } catch (...) {
        drop_all();
        throw;
      }
      if (settled.empty() || settled.back() != stripe) settled.push_back(stripe);
      pages.pop_back();
    }
    for (Stripe* stripe : settled) stripe->settle_room(0);  // not before: it moves rows
  }
  for (const Need& need : needs) need.stripe->settle_room(need.entries);
}

int64_t Table::fitting(const int64_t* ids, int64_t count) {
  int64_t taken[kStripesMax] = {}, room[kStripesMax] = {};
  for (int64_t i = 0; i < count; i++) {
    const int b = stripe_of(hash_of(ids[i]));
    if (taken[b] == 0) {
      const Stripe& stripe = stripes_[static_cast<size_t>(b)];
      for (room[b] = shape_.rows_max; room[b] > 1 && stripe.rows_over(room[b], room[b]) > stripe.rows();) room[b] /= 2;
      room[b] = std::max<int64_t>(1, room[b] / 2);
    }
    if (++taken[b] > room[b]) return i;
  }
  return count;
}

void Table::unpin(const int64_t* ids, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    const uint64_t hash = hash_of(ids[i]);
    const Found found = stripe_at(hash).find(hash, ids[i]);
    if (found.row != nullptr) found.row->marks &= ~kPinned;
  }
}

void Table::gather(const int64_t* ids, int64_t count, bool admit) {
  std::vector<Need> needs(settings_.stripes);
  for (size_t b = 0; b < stripes_.size(); b++) needs[b] = {&stripes_[b], 0, 0};
  Wants wants{ids, {}, {}};
  try {
    for (int64_t i = 0; i < count; i++) {
      const uint64_t hash = hash_of(ids[i]);
      Stripe& stripe = stripe_at(hash);
      Need& need = needs[static_cast<size_t>(stripe_of(hash))];
      const Found found = stripe.find(hash, ids[i]);
      if (found.row != nullptr) {
        found.row->marks |= kPinned;
        continue;
      }
      int64_t there = 0;
      stripe.each_spilled(hash, [&](uint32_t) { there++; });
      const bool is_refused = !admit && stripe.candidates.count(ids[i], hash) + kSighting < settings_.admit_after * kSighting;
      if (there == 0 && is_refused) continue;
      need.rows += std::max<int64_t>(there, 1);
      need.entries++;  // even with a row on disk, for that may be another id's of the same hash
    }
    needs.erase(std::remove_if(needs.begin(), needs.end(), [](const Need& need) { return need.rows == 0; }), needs.end());
    make_room(needs);
    for (int64_t i = 0; i < count; i++) {
      const uint64_t hash = hash_of(ids[i]);
      Stripe& stripe = stripe_at(hash);
      if (stripe.find(hash, ids[i]).row == nullptr) wants.add(stripe, hash, i);
    }
    wants.sort(shape_.unit_rows, shape_.spill_base);
    read_wanted(wants, [&](const Want& want, const Header* stored) {
      if (want.stripe->find(hash_of(stored->id), stored->id).row != nullptr) return;  // a repeated id
      Found found;
      const uint32_t marks = want.stripe->header_now(want.number, stored, settings_.decay).marks;
      give_unit(want.stripe->bring_in(want.number, stored, marks | kPinned, &found));
    });
  } catch (...) {
    unpin(ids, count);
    throw;
  }
}

// ---- deletions -----------------------------------------------------------------------------------------------

int64_t Table::erase_spilled(const int64_t* ids, int64_t count) {
  Wants wants{ids, {}, {}};
  for (int64_t i = 0; i < count; i++) {
    const uint64_t hash = hash_of(ids[i]);
    wants.add(stripe_at(hash), hash, i);
  }
  wants.sort(shape_.unit_rows, shape_.spill_base);
  int64_t erased = 0;
  uint32_t last = kNone;  // an id may be repeated
  const Stripe* where = nullptr;
  read_wanted(wants, [&](const Want& want, const Header* stored) {
    if (want.number == last && want.stripe == where) return;
    last = want.number;
    where = want.stripe;
    give_unit(want.stripe->remove_spilled(want.number, stored));
    want.stripe->dropped++;
    erased++;
  });
  return erased;
}

int64_t Table::expire_spilled(Stripe& stripe) {
  if (settings_.expire_after == 0) return 0;
  std::vector<std::pair<Stripe*, uint32_t>> units;
  for (uint32_t u = 0; u < stripe.units(); u++) {
    if (stripe.unit(u).live > 0 && has_expired(stripe.unit(u).oldest, clock_)) units.emplace_back(&stripe, u);
  }
  int64_t expired = 0;
  read_units(units, [&](int64_t i, const char* buffer) {
    const uint32_t u = units[static_cast<size_t>(i)].second;
    Unit& unit = stripe.unit(u);
    uint32_t oldest = kNone;
    for (int64_t place = 0; place < shape_.unit_rows && unit.live > 0; place++) {
      if (unit.hashes[place] == 0) continue;
      const Header* stored = reinterpret_cast<const Header*>(buffer + place * shape_.row_bytes);
      if (!has_expired(stored->last, clock_)) {
        oldest = std::min(oldest, stored->last);
        continue;
      }
      give_unit(stripe.remove_spilled(stripe.number_of(u, place), stored));
      stripe.expired++;
      expired++;
    }
    unit.oldest = oldest;
  });
  return expired;
}

// ---- copies --------------------------------------------------------------------------------------------------

bool Table::export_spilled(int64_t b, int64_t from, int64_t limit, Rows* to) {
  Stripe& stripe = stripes_[static_cast<size_t>(b)];
  const int64_t begin = std::max<int64_t>(0, from - shape_.spill_base);
  std::vector<std::pair<Stripe*, uint32_t>> units;
  int64_t rows = 0, u = begin / shape_.unit_rows;
  for (; u < stripe.units() && static_cast<int64_t>(to->ids.size()) + rows <= limit + shape_.unit_rows; u++) {
    if (stripe.unit(static_cast<uint32_t>(u)).live == 0) continue;
    units.emplace_back(&stripe, static_cast<uint32_t>(u));
    rows += stripe.unit(static_cast<uint32_t>(u)).live;
  }
  std::vector<Rows> found(units.size());
  std::vector<std::vector<uint32_t>> numbers(units.size());
  read_units(units, [&](int64_t i, const char* buffer) {
    const uint32_t unit = units[static_cast<size_t>(i)].second;
    for (int64_t place = 0; place < shape_.unit_rows; place++) {
      const uint32_t number = stripe.number_of(unit, place);
      if (stripe.unit(unit).hashes[place] == 0 || number < from) continue;
      const Header* stored = reinterpret_cast<const Header*>(buffer + place * shape_.row_bytes);
      if (has_expired(stored->last, clock_)) continue;
      copy_row(stripe.header_now(number, stored, settings_.decay), reinterpret_cast<const float*>(stored + 1), width(),
               &found[static_cast<size_t>(i)]);
      numbers[static_cast<size_t>(i)].push_back(number);
    }
  });
  for (size_t i = 0; i < found.size(); i++) {
    const size_t room = static_cast<size_t>(limit) - to->ids.size(), count = std::min(room, found[i].ids.size());
    const auto take = [count](auto& target, const auto& source, size_t each) {
      target.insert(target.end(), source.begin(), source.begin() + static_cast<int64_t>(count * each));
    };
    take(to->ids, found[i].ids, 1);
    take(to->values, found[i].values, static_cast<size_t>(width()));
    take(to->counts, found[i].counts, 1);
    take(to->last_seen, found[i].last_seen, 1);
    if (count < found[i].ids.size()) {
      to->next = b << 32 | numbers[i][count];
      return false;
    }
  }
  if (u < stripe.units()) {
    to->next = b << 32 | stripe.number_of(static_cast<uint32_t>(u), 0);
    return false;
  }
  return true;
}

bool Table::changes_spilled(Stripe& stripe, uint32_t mark, int64_t limit, Rows* to) {
  int64_t rows = static_cast<int64_t>(to->ids.size());
  bool is_all = true;
  std::vector<std::pair<Stripe*, uint32_t>> units;
  for (uint32_t u = 0; u < stripe.units() && is_all; u++) {
    if (stripe.unit(u).live == 0 || !((stripe.unit(u).some | stripe.unit(u).all) & mark)) continue;
    is_all = rows < limit;
    if (is_all) units.emplace_back(&stripe, u);
    rows += stripe.unit(u).live;
  }
  read_units(units, [&](int64_t i, const char* buffer) {
    const uint32_t unit = units[static_cast<size_t>(i)].second;
    for (int64_t place = 0; place < shape_.unit_rows; place++) {
      if (stripe.unit(unit).hashes[place] == 0) continue;
      const Header* stored = reinterpret_cast<const Header*>(buffer + place * shape_.row_bytes);
      const Header now = stripe.header_now(stripe.number_of(unit, place), stored, settings_.decay);
      if (now.marks & mark) copy_row(now, reinterpret_cast<const float*>(stored + 1), width(), to);
    }
  });
  for (const auto& [where, unit] : units) stripe.unit(unit).unmark(mark);
  return is_all;
}

// ---- ahead of time -------------------------------------------------------------------------------------------

Table::~Table() {
  {
    std::lock_guard<std::mutex> hold(warming_);
    is_closing_ = true;
  }
  has_batch_.notify_all();
  if (warmer_.joinable()) warmer_.join();
}

void Table::prefetch(const int64_t* ids, int64_t count) {
  if (disk_ == nullptr) return;
  std::lock_guard<std::mutex> hold(warming_);
  if (!warmer_.joinable()) {
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);  // signals are for the program's own threads
    warmer_ = std::thread([this] { warm(); });
    pthread_sigmask(SIG_SETMASK, &old, nullptr);
  }
  if (batches_.size() == kBatchesMax) batches_.pop_front();
  batches_.emplace_back(ids, ids + count);
  has_batch_.notify_one();
}

void Table::warm() {
  std::unique_lock<std::mutex> hold(warming_);
  for (;;) {
    has_batch_.wait(hold, [this] { return is_closing_ || !batches_.empty(); });
    if (is_closing_) return;
    const std::vector<int64_t> ids = std::move(batches_.front());
    batches_.pop_front();
    hold.unlock();
    try {
      warm_batch(ids);
    } catch (const std::exception&) {
      // The pull that needs these rows will meet the same, and say so.
    }
    hold.lock();
  }
}

// Rows are read while others use the table; a row that has moved meanwhile stays where it is.
void Table::warm_batch(const std::vector<int64_t>& ids) {
  const size_t row_bytes = static_cast<size_t>(shape_.row_bytes);
  for (size_t first = 0; first < ids.size();) {
    Wants wants{ids.data(), {}, {}};
    std::vector<uint32_t> files;
    {
      std::unique_lock<std::shared_mutex> hold(lock_);
      int64_t rows[kStripesMax] = {};
      bool is_enough = false;
      const size_t begin = first;
      int64_t sum = 0;
      for (; first < ids.size() && sum < warm_rows() && !is_enough; first++) {
        const uint64_t hash = hash_of(ids[first]);
        Stripe& stripe = stripe_at(hash);
        int64_t& more = rows[stripe_of(hash)];
        stripe.each_spilled(hash, [&](uint32_t) { more++, sum++; });
        is_enough = more > stripe.rows() / 4;
      }
      std::vector<Need> needs;
      for (int b = 0; b < settings_.stripes; b++) {
        if (rows[b] > 0) needs.push_back({&stripes_[static_cast<size_t>(b)], rows[b], 0});
      }
      make_room(needs);
      for (size_t i = begin; i < first; i++) wants.add(stripe_at(hash_of(ids[i])), hash_of(ids[i]), static_cast<int64_t>(i));
      wants.sort(shape_.unit_rows, shape_.spill_base);
      files = files_of(wants);
    }
    std::vector<char> stored(wants.all.size() * row_bytes);
    disk_->read(files, [&](int64_t i, const char* buffer) {
      for (size_t w = wants.begin(i); w < wants.end(i); w++) {
        const size_t place = static_cast<size_t>((wants.all[w].number - shape_.spill_base) % shape_.unit_rows);
        std::copy_n(buffer + place * row_bytes, row_bytes, stored.data() + w * row_bytes);
      }
    });
    std::unique_lock<std::shared_mutex> hold(lock_);
    for (size_t w = 0; w < wants.all.size(); w++) {
      const auto& [stripe, number, generation, index] = wants.all[w];
      const Header* row = reinterpret_cast<const Header*>(stored.data() + w * row_bytes);
      const Unit& unit = stripe->unit_of(number);
      const bool is_there = unit.live > 0 && unit.generation == generation && unit.hashes[stripe->place_of(number)] != 0;
      if (!is_there || row->id != ids[static_cast<size_t>(index)] || stripe->rows_over(1, 0) > 0) continue;
      Found found;
      give_unit(stripe->bring_in(number, row, stripe->header_now(number, row, settings_.decay).marks | kWarm, &found));
    }
  }
}

}  // namespace headwater
