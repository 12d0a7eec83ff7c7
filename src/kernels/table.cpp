#include "table.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "passes.h"
#include "pool.h"

namespace headwater {
namespace {

constexpr int64_t kBudgetLog = 64;          // this part for the ids of deleted rows
constexpr int64_t kBudgetCandidates = 8;    // this part for the counters of ids without a row, when there are any
constexpr int64_t kCandidatesMin = 16 << 10;  // bytes of a stripe, without a budget
constexpr int64_t kStripeRowsMin = 16;
constexpr int64_t kBlock = 6;               // ids whose looks ahead follow each other
constexpr int64_t kRing = 32;               // for what the looks remember: at least four blocks
constexpr int64_t kAddressed = 8;           // times as many rows as there are have addresses, when these run out
constexpr int64_t kAlone = 2048;            // ids: fewer are not worth waking a thread
constexpr int64_t kPart = 2048;             // ids that a thread takes at a time
constexpr int64_t kSweepRows = 1 << 14;

}  // namespace

// ---- size ----------------------------------------------------------------------------------------------------

Table::Table(const TableSettings& settings) : settings_(settings), stripes_(static_cast<size_t>(settings.stripes)) {
  start_.kind = settings.initial;
  start_.scale = static_cast<float>(settings.initial == Initial::normal ? settings.scale * std::sqrt(1.5) / 65536.0 : settings.scale);
  start_.seed = mix64(settings.seed);
  step_row_ = settings.level->step[static_cast<int>(settings.rule)];
  shape_.dim = settings.dim;
  shape_.slots = static_cast<int64_t>(settings.initial_slots.size());
  shape_.row_bytes = static_cast<int64_t>(sizeof(Header)) + width() * static_cast<int64_t>(sizeof(float));
  shape_.victim = settings.victim;
  shape_.seed = mix64(settings.seed ^ 0x5eed);
  shape_.decay = settings.decay;
  shape_.spill_base = kNone;
  if (settings.spills) {
    shape_.unit_rows = std::max<int64_t>(1, Range::kPage / shape_.row_bytes);
    shape_.unit_bytes = (shape_.unit_rows * shape_.row_bytes + Range::kPage - 1) / Range::kPage * Range::kPage;
  }
  plan_budget();
  if (settings.spills) {
    shape_.spill_base = static_cast<uint32_t>(shape_.rows_max);
    disk_ = std::make_unique<Disk>(settings.spill_folder, shape_.unit_bytes);
  }
  for (int i = 0; i < settings_.stripes; i++) stripes_[static_cast<size_t>(i)].init(&shape_, i);
  make_addresses(settings.budget_bytes > 0 ? shape_.rows_max : 0);
}

// Gives every stripe addresses for at least so many rows.
void Table::make_addresses(int64_t rows) {
  const int64_t each = std::max<int64_t>(1, (rows * shape_.row_bytes + Range::kHugePage - 1) / Range::kHugePage) * Range::kHugePage;
  auto fresh = std::make_unique<Addresses>(each * settings_.stripes);
  for (size_t i = 0; i < stripes_.size(); i++) fresh->open(static_cast<int64_t>(i) * each, stripes_[i].row_bytes_held());
  run_tasks(settings_.stripes, settings_.threads, [&](int64_t i) {
    stripes_[static_cast<size_t>(i)].move_rows(fresh->start() + i * each, each, fresh->are_open());
    return true;
  });
  addresses_ = std::move(fresh);
  addressed_rows_ = each / shape_.row_bytes;
}

// Sets the limits of one stripe, so that all of them together stay within the budget whatever happens.
void Table::set_limits(int64_t budget) {
  const bool spills = settings_.spills;
  const int64_t share = (budget - fixed_bytes()) / settings_.stripes;
  shape_.deleted_max = std::max<int64_t>(0, share / kBudgetLog / static_cast<int64_t>(sizeof(int64_t)));
  shape_.candidates_bytes = settings_.admit_after > 1 ? std::max<int64_t>(256, share / kBudgetCandidates) : 0;
  shape_.quota = share - shape_.deleted_max * static_cast<int64_t>(sizeof(int64_t)) - shape_.candidates_bytes;
  const int64_t ahead = spills ? kPagesAhead * (static_cast<int64_t>(sizeof(Unit)) + 4 * shape_.unit_rows + 16) : 0;
  const int64_t line_bytes = static_cast<int64_t>(sizeof(Line)), lines_rows = kLineRows * shape_.row_bytes + line_bytes;
  const int64_t rows = std::max<int64_t>(0, shape_.quota - ahead - 2 * line_bytes) * kLineRows / lines_rows;
  shape_.rows_max = std::min<int64_t>(rows * shape_.row_bytes / Range::kPage * Range::kPage / shape_.row_bytes, kRowsMax);  // whole pages
  shape_.lines_max = spills ? INT64_MAX / 2 : (shape_.rows_max + kLineRows - 1) / kLineRows;
}

void Table::plan_budget() {
  if (settings_.budget_bytes == 0) {
    shape_.quota = shape_.lines_max = INT64_MAX / 2;
    shape_.rows_max = kRowsMax;
    shape_.candidates_bytes = shape_.deleted_max = -1;
    return;
  }
  const auto holds_a_few = [this](int64_t budget) {
    set_limits(budget);
    return shape_.rows_max >= std::max(kStripeRowsMin, settings_.spills ? 2 * shape_.unit_rows : 0);
  };
  if (holds_a_few(settings_.budget_bytes)) return;
  int64_t smallest = settings_.budget_bytes;
  while (!holds_a_few(smallest)) smallest += smallest / 16 + 4096;
  throw std::invalid_argument("Expected a budget of at least about " + std::to_string(smallest) + " bytes for a few rows of " +
                              std::to_string(shape_.row_bytes) + " bytes in each of " + std::to_string(settings_.stripes) + " stripes, got " +
                              std::to_string(settings_.budget_bytes) + ".");
}

int64_t Table::rows_max() const {
  return settings_.budget_bytes == 0 ? 0 : shape_.rows_max * settings_.stripes;
}

int64_t Table::fixed_bytes() const {
  const int64_t spilling = settings_.spills ? Disk::kDepth * shape_.unit_bytes + warm_rows() * shape_.row_bytes : 0;
  return static_cast<int64_t>(sizeof(Table) + stripes_.size() * sizeof(Stripe)) + spilling;
}

int64_t Table::bytes_unlocked() {
  int64_t sum = fixed_bytes();
  for (const Stripe& stripe : stripes_) sum += stripe.bytes();
  return sum;
}

int64_t Table::bytes() {
  std::shared_lock<std::shared_mutex> hold(lock_);
  return bytes_unlocked();
}

TableStats Table::stats() {
  std::shared_lock<std::shared_mutex> hold(lock_);
  TableStats sum = {};
  for (const Stripe& stripe : stripes_) {
    sum.rows += stripe.rows();
    sum.admitted += stripe.admitted;
    sum.refused += stripe.refused;
    sum.evicted += stripe.evicted;
    sum.expired += stripe.expired;
    sum.deleted += stripe.dropped;
    sum.spilled_rows += stripe.spilled();
    sum.spilled += stripe.written;
    sum.loaded += stripe.loaded;
  }
  if (disk_ != nullptr) sum.spilled_bytes = disk_->bytes();
  sum.bytes = bytes_unlocked();
  sum.budget_bytes = settings_.budget_bytes;
  sum.rows_max = rows_max();
  sum.step = step_;
  sum.hits = hits_;
  sum.misses = misses_;
  return sum;
}

// ---- looking up ----------------------------------------------------------------------------------------------

namespace {

// As run_tasks does; what a task throws is thrown here when all that have begun are over.
void run_all(int64_t count, int threads, const std::function<void(int64_t)>& task) {
  std::exception_ptr failure;
  std::mutex failing;
  run_tasks(count, threads, [&](int64_t i) {
    try {
      task(i);
    } catch (...) {
      std::lock_guard<std::mutex> hold(failing);
      failure = std::current_exception();
      return false;
    }
    return true;
  });
  if (failure) std::rethrow_exception(failure);
}

// Calls, for every i in [begin, end), one after the other and with what they remember: line, row, rest — the three looks ahead — and use.
// Each is done for a block at a time: a look at a page that the CPU has not seen lately holds it up until that is found, unless the next
// such look is among the few hundred instructions that follow, which it begins meanwhile. With larger blocks too many come at once.
template <class Line, class Row, class Rest, class Use>
void look_ahead(int64_t begin, int64_t end, Line line, Row row, Rest rest, Use use) {
  Stripe::Sight sights[kRing];
  const auto each = [&](int64_t first, auto look) {
    const int64_t limit = std::min(first + kBlock, end);
    for (int64_t i = std::max(first, begin); i < limit; i++) look(i, &sights[static_cast<uint64_t>(i) % kRing]);
  };
  for (int64_t at = begin - 3 * kBlock; at < end; at += kBlock) {
    each(at + 3 * kBlock, line);
    each(at + 2 * kBlock, row);
    each(at + kBlock, rest);
    each(at, use);
  }
}

}  // namespace

// Calls use(i, hash, found) for every id, in any order and on several threads. Returns how often it said `row`, and for which ids
// `later`, in their order. `bytes` of each row are asked for ahead. numbers: what most likely are the rows' own, or null.
template <bool prefetch, class Use>
Table::LookedUp Table::look_up(const int64_t* ids, int64_t count, const uint32_t* numbers, int64_t bytes, Use use) const {
  LookedUp all;
  std::mutex adding;
  run_all((count + kPart - 1) / kPart, count < kAlone ? 1 : settings_.threads, [&](int64_t part) {
    const int64_t end = std::min(count, (part + 1) * kPart), begin = part * kPart;
    LookedUp mine;
    const auto use_one = [&](int64_t i, uint64_t hash, Found found) {
      const Seen said = use(i, hash, found);
      mine.rows += said == Seen::row;
      if (said == Seen::later) mine.later.push_back(i);
    };
    const auto look_at_line = [&](int64_t i, Stripe::Sight* sight) { stripe_at(hash_of(ids[i])).look_at_line(hash_of(ids[i]), sight); };
    const auto look_for_row = [](int64_t, Stripe::Sight* sight) { sight->stripe->look_for_row(sight); };
    const auto look_for_number = [&](int64_t i, Stripe::Sight* sight) {
      stripe_at(hash_of(ids[i])).look_for_row(hash_of(ids[i]), numbers[i], sight);
    };
    const auto look_at_row = [&](int64_t, Stripe::Sight* sight) { sight->stripe->look_at_row(bytes, sight); };
    const auto find = [&](int64_t i, Stripe::Sight* sight) { use_one(i, sight->hash, sight->stripe->find(ids[i], *sight)); };
    if (!prefetch) {
      for (int64_t i = begin; i < end; i++) use_one(i, hash_of(ids[i]), stripe_at(hash_of(ids[i])).find(hash_of(ids[i]), ids[i]));
    } else if (numbers == nullptr) {
      look_ahead(begin, end, look_at_line, look_for_row, look_at_row, find);
    } else {
      look_ahead(begin, end, [](int64_t, Stripe::Sight*) {}, look_for_number, look_at_row, find);
    }
    std::lock_guard<std::mutex> hold(adding);
    all.rows += mine.rows;
    all.later.insert(all.later.end(), mine.later.begin(), mine.later.end());
  });
  std::sort(all.later.begin(), all.later.end());
  return all;
}

// ---- pull ----------------------------------------------------------------------------------------------------

// Rows in memory, and initial values; later: those of ids whose rows may be on disk.
template <bool prefetch>
Table::LookedUp Table::pull_all(const int64_t* ids, int64_t count, float* out, uint32_t* numbers, bool touch, uint32_t clock) const {
  const int64_t bytes = std::min<int64_t>(kRowBytesAhead, static_cast<int64_t>(sizeof(Header)) + settings_.dim * 4);
  return look_up<prefetch>(ids, count, nullptr, bytes, [&](int64_t i, uint64_t hash, Found found) {
    if (numbers != nullptr) numbers[i] = found.number;
    float* to = out + i * settings_.dim;
    // Readers touch rows side by side; all of them write the same or a later time.
    const uint32_t last = found.row == nullptr ? 0 : __atomic_load_n(&found.row->last, __ATOMIC_RELAXED);
    if (found.row == nullptr || has_expired(last, clock)) {
      settings_.level->fill(start_, key_of(hash), to, settings_.dim);
      bool may_be = false;
      if (found.row == nullptr) stripe_at(hash).each_spilled(hash, [&](uint32_t) { may_be = true; });
      return may_be ? Seen::later : Seen::nothing;
    }
    copy_floats(to, found.row->values(), settings_.dim);
    if (touch && last < clock) __atomic_store_n(&found.row->last, clock, __ATOMIC_RELAXED);
    if (touch && (__atomic_load_n(&found.row->marks, __ATOMIC_RELAXED) & kWarm)) {
      __atomic_fetch_and(&found.row->marks, ~kWarm, __ATOMIC_RELAXED);
    }
    return Seen::row;
  });
}

int64_t Table::pull(const int64_t* ids, int64_t count, float* out, uint32_t* numbers, bool touch, int64_t now, bool prefetch) {
  const auto all = [&](uint32_t clock) {
    return prefetch ? pull_all<true>(ids, count, out, numbers, touch, clock) : pull_all<false>(ids, count, out, numbers, touch, clock);
  };
  LookedUp found;
  {
    std::shared_lock<std::shared_mutex> hold(lock_);
    const uint32_t clock = advance(step_, now);
    found = all(clock);
    if (!found.later.empty() && !touch) found.rows += pull_spilled(ids, found.later, out, false, clock);
  }
  if (!found.later.empty() && touch) {  // again, from the beginning, for it is to be one state of the table
    std::unique_lock<std::shared_mutex> hold(lock_);
    const uint32_t clock = advance(step_, now);
    found = all(clock);
    if (!found.later.empty()) found.rows += pull_spilled(ids, found.later, out, true, clock);
  }
  hits_ += found.rows;
  misses_ += count - found.rows;
  return found.rows;
}

// ---- changes -------------------------------------------------------------------------------------------------

// Ids by stripe, those of a stripe in the order of the batch. some: those of them that are meant, or null: all.
class Table::Sorted {
 public:
  Sorted(const Table& table, const int64_t* ids, int64_t count, const int64_t* some)
      : hashes_(static_cast<size_t>(count)), order_(static_cast<size_t>(count)) {
    const auto source_of = [some](int64_t i) { return some == nullptr ? i : some[i]; };
    for (int64_t i = 0; i < count; i++) ends_[table.stripe_of(hash_of(ids[source_of(i)]))]++;
    int64_t next[kStripesMax], sum = 0;
    for (int b = 0; b < table.settings_.stripes; b++) {
      next[b] = sum;
      ends_[b] = sum += ends_[b];
    }
    for (int64_t i = 0; i < count; i++) {
      const uint64_t hash = hash_of(ids[source_of(i)]);
      const size_t to = static_cast<size_t>(next[table.stripe_of(hash)]++);
      hashes_[to] = hash;
      order_[to] = source_of(i);
    }
  }
  int64_t begin(int64_t stripe) const { return stripe == 0 ? 0 : ends_[stripe - 1]; }
  int64_t end(int64_t stripe) const { return ends_[stripe]; }
  uint64_t hash(int64_t i) const { return hashes_[static_cast<size_t>(i)]; }
  int64_t source(int64_t i) const { return order_[static_cast<size_t>(i)]; }

 private:
  int64_t ends_[kStripesMax] = {};
  std::vector<uint64_t> hashes_;
  std::vector<int64_t> order_;
};

// Calls visit(stripe, i, sight) for every id, those of a stripe one after the other on one thread, in the order of the batch.
// some: `count` of the ids, by their places, or null: all. data: an array of `width` floats for each id that the visit will read, or null.
template <class Visit>
void Table::visit(const int64_t* ids, int64_t count, const int64_t* some, const float* data, int64_t width, Visit visit) {
  const Sorted sorted(*this, ids, count, some);
  // Many more addresses than rows could be in a moment, before anybody has a row at hand, for all of them move. (Who deletes has no data.)
  int64_t most = 0;
  for (int b = 0; b < settings_.stripes; b++) {
    most = std::max(most, stripes_[static_cast<size_t>(b)].used() + sorted.end(b) - sorted.begin(b));
  }
  if (settings_.budget_bytes == 0 && data != nullptr && std::min(most, shape_.rows_max) > addressed_rows_) {
    for (int64_t times = kAddressed;; times /= 2) {
      try {
        make_addresses(std::min(times * most, shape_.rows_max));
        break;
      } catch (const std::bad_alloc&) {
        if (times == 1) throw;
      }
    }
  }
  const int64_t row_bytes = std::min(kRowBytesAhead, shape_.row_bytes);
  run_all(settings_.stripes, count < kAlone ? 1 : settings_.threads, [&](int64_t b) {
    Stripe& stripe = stripes_[static_cast<size_t>(b)];
    look_ahead(
        sorted.begin(b), sorted.end(b), [&](int64_t i, Stripe::Sight* sight) { stripe.look_at_line(sorted.hash(i), sight); },
        [&](int64_t, Stripe::Sight* sight) { stripe.look_for_row(sight); },
        [&](int64_t i, Stripe::Sight* sight) {
          stripe.look_at_row(row_bytes, sight);
          __builtin_prefetch(ids + sorted.source(i));
          const float* row = data + sorted.source(i) * width;
          for (int64_t at = 0; at < std::min(width * 4, kRowBytesAhead); at += 64) __builtin_prefetch(row + at / 4);
        },
        [&](int64_t i, Stripe::Sight* sight) { visit(stripe, sorted.source(i), *sight); });
  });
}

uint32_t Table::advance(int64_t step, int64_t now) {
  if (step > step_) {
    step_ = step;
    decay();
  }
  const uint32_t clock = static_cast<uint32_t>(settings_.expires_by_time ? now : step);
  uint32_t latest = clock_;
  while (latest < clock && !clock_.compare_exchange_weak(latest, clock)) {}
  return std::max(latest, clock);
}

// Brings the counts of all rows up to date with the step.
void Table::decay() {
  const uint64_t period = static_cast<uint64_t>(step_ / kDecaySteps);
  if (period == period_) return;
  period_ = period;
  run_tasks(settings_.stripes, settings_.threads, [&](int64_t b) {
    stripes_[static_cast<size_t>(b)].decay(settings_.decay, period);
    return true;
  });
}

// Deletes what has expired by now of the rows with these numbers.
int64_t Table::expire(Stripe& stripe, uint32_t first, uint32_t limit) {
  if (settings_.expire_after == 0) return 0;
  const int64_t before = stripe.rows();
  for (uint32_t n = first; n < limit; n++) {
    Header* row = stripe.row(n);
    if (!row->is_free() && has_expired(row->last, clock_)) stripe.remove({n, row});
  }
  stripe.expired += before - stripe.rows();
  return before - stripe.rows();
}

// The row of an id that is about to be written; value and state of a new one are garbage. None: it is not admitted yet.
Found Table::obtain(Stripe& stripe, int64_t id, const Stripe::Sight& sight, uint32_t clock, bool admit, bool* is_new) {
  const uint64_t hash = sight.hash;
  Found found = stripe.find(id, sight);
  if (found.row != nullptr && has_expired(found.row->last, clock)) {
    stripe.remove(found);
    stripe.expired++;
    found = {};
  }
  *is_new = found.row == nullptr;
  if (!*is_new) return found;
  uint32_t count = 0;
  if (settings_.admit_after > 1) {
    const uint32_t last = stripe.candidates.last_seen(id, hash);
    if (admit || (last != kNone && has_expired(last, clock))) stripe.candidates.forget(id, hash);
    if (!admit) {
      const int64_t rows_part = std::max(kCandidatesMin, stripe.rows() * shape_.row_bytes / kBudgetCandidates);
      count = stripe.candidates.see(id, hash, clock, shape_.candidates_bytes >= 0 ? shape_.candidates_bytes : rows_part);
      if (count < settings_.admit_after * kSighting) {
        stripe.refused++;
        return {};
      }
      stripe.candidates.forget(id, hash);
      count -= kSighting;  // this sighting is counted like that of any row
    }
  }
  found = stripe.insert(hash, id, clock);
  found.row->set_count(count);
  stripe.admitted++;
  return found;
}

void Table::push(const int64_t* ids, int64_t count, const float* gradients, const float* scalars, const uint32_t* numbers, int64_t step,
                 int64_t now) {
  std::unique_lock<std::shared_mutex> hold(lock_);
  const uint32_t clock = advance(step, now);
  if (disk_ != nullptr) gather(ids, count, false);
  const auto see = [&](Header& row) {
    row.last = std::max(row.last, clock);
    row.marks = std::min(row.count() + kSighting, kCountMax) << 8 | (row.marks & kOfConsumers) | shape_.followers;
  };
  // Rows that are there: no two threads have the same one, and the index stays as it is, so nothing needs to be sorted.
  const LookedUp found = look_up<true>(ids, count, numbers, std::min(kRowBytesAhead, shape_.row_bytes), [&](int64_t i, uint64_t, Found found) {
    if (found.row == nullptr || has_expired(found.row->last, clock)) return Seen::later;
    see(*found.row);
    step_row_(scalars, found.row->values(), gradients + i * settings_.dim, settings_.dim);
    return Seen::row;
  });
  const int64_t rest = static_cast<int64_t>(found.later.size());
  visit(ids, rest, found.later.data(), gradients, settings_.dim, [&](Stripe& stripe, int64_t i, const Stripe::Sight& sight) {
    bool is_new;
    const Found found = obtain(stripe, ids[i], sight, clock, false, &is_new);
    if (found.row == nullptr) return;
    see(*found.row);
    float* values = found.row->values();
    const float* gradient = gradients + i * settings_.dim;
    if (!is_new) {  // an id that is repeated
      step_row_(scalars, values, gradient, settings_.dim);
      return;
    }
    // Made apart from where it is to lie, or the step would wait until that has come from memory; and on the boundary of a
    // line, for only so does the CPU pass on what was just written.
    thread_local std::vector<float> room;
    room.resize(static_cast<size_t>(width()) + 16);
    float* fresh = room.data() + (-reinterpret_cast<uintptr_t>(room.data()) % 64) / sizeof(float);
    settings_.level->fill(start_, key_of(sight.hash), fresh, settings_.dim);
    copy_floats(fresh + settings_.dim, settings_.initial_slots.data(), shape_.slots);
    step_row_(scalars, fresh, gradient, settings_.dim);
    copy_floats(values, fresh, width());
  });
}

void Table::put(const int64_t* ids, int64_t count, const float* rows, const float* counts, const int64_t* last_seen, int64_t step,
                int64_t now) {
  std::unique_lock<std::shared_mutex> hold(lock_);
  const uint32_t clock = advance(step, now);
  if (disk_ == nullptr) return put_part(ids, count, rows, counts, last_seen, clock);
  for (int64_t at = 0; at < count;) {
    const int64_t part = fitting(ids + at, count - at);
    gather(ids + at, part, true);
    put_part(ids + at, part, rows + at * width(), counts + at, last_seen + at, clock);
    at += part;
  }
}

void Table::put_part(const int64_t* ids, int64_t count, const float* rows, const float* counts, const int64_t* last_seen, uint32_t clock) {
  visit(ids, count, nullptr, rows, width(), [&](Stripe& stripe, int64_t i, const Stripe::Sight& sight) {
    bool is_new;
    Header& row = *obtain(stripe, ids[i], sight, clock, true, &is_new).row;
    row.last = static_cast<uint32_t>(last_seen[i]);
    row.marks = static_cast<uint32_t>(counts[i] * kSighting) << 8 | (row.marks & kOfConsumers) | shape_.followers;
    copy_floats(row.values(), rows + i * width(), width());
  });
}

int64_t Table::erase(const int64_t* ids, int64_t count) {
  std::unique_lock<std::shared_mutex> hold(lock_);
  std::atomic<int64_t> erased{0};
  visit(ids, count, nullptr, nullptr, 0, [&](Stripe& stripe, int64_t i, const Stripe::Sight& sight) {
    const Found found = stripe.find(ids[i], sight);
    stripe.candidates.forget(ids[i], sight.hash);
    if (found.row == nullptr) return;
    stripe.remove(found);
    stripe.dropped++;
    erased++;
  });
  return erased + (disk_ != nullptr ? erase_spilled(ids, count) : 0);
}

int64_t Table::sweep(int64_t step, int64_t now) {
  std::unique_lock<std::shared_mutex> hold(lock_);
  advance(step, now);
  if (settings_.expire_after == 0) return 0;
  int64_t looked_at = 0, expired = 0;
  for (int i = 0; i < settings_.stripes && looked_at < kSweepRows; i++) {
    Stripe& stripe = stripes_[static_cast<size_t>(sweep_stripe_)];
    const uint32_t end = static_cast<uint32_t>(std::min<int64_t>(stripe.used(), sweep_row_ + kSweepRows - looked_at));
    looked_at += std::max<int64_t>(0, static_cast<int64_t>(end) - sweep_row_);
    expired += expire(stripe, sweep_row_, end);
    sweep_row_ = end;
    if (end < stripe.used()) break;
    if (disk_ != nullptr) expired += expire_spilled(stripe);
    sweep_stripe_ = (sweep_stripe_ + 1) % settings_.stripes;
    sweep_row_ = 0;
  }
  return expired;
}

// ---- copies --------------------------------------------------------------------------------------------------

void Table::copy_row(const Header& header, const float* values, int64_t width, Rows* to) {
  to->ids.push_back(header.id);
  to->values.insert(to->values.end(), values, values + width);
  to->counts.push_back(static_cast<float>(header.count()) / kSighting);
  to->last_seen.push_back(header.last);
}

// A cursor is stripe << 32 | row number.
Rows Table::export_rows(int64_t cursor, int64_t limit) {
  std::unique_lock<std::shared_mutex> hold(lock_);  // a pull would touch rows meanwhile
  Rows found;
  int64_t rows = 0;
  for (const Stripe& stripe : stripes_) rows += stripe.rows() + stripe.spilled();
  found.reserve(std::min(limit, rows), width());
  int64_t from = cursor & 0xffffffff;
  for (int64_t b = cursor >> 32; b < settings_.stripes; b++, from = 0) {
    Stripe& stripe = stripes_[static_cast<size_t>(b)];
    for (int64_t n = from; n < stripe.used(); n++) {
      if (static_cast<int64_t>(found.ids.size()) == limit) {
        found.next = b << 32 | n;
        return found;
      }
      Header* row = stripe.row(static_cast<uint32_t>(n));
      if (!row->is_free() && !has_expired(row->last, clock_)) copy_row(*row, row->values(), width(), &found);
    }
    if (disk_ != nullptr && !export_spilled(b, from, limit, &found)) return found;
  }
  return found;
}

// ---- the delta stream ----------------------------------------------------------------------------------------
// Each row has a mark for each consumer that has not got it as it is now, each stripe a log of what was deleted, with a place
// in it for each consumer. Whoever is new, or was overtaken by the log, starts over: all rows are marked.

int Table::consumer_of(const std::string& name) const {
  for (int c = 0; c < kConsumersMax; c++) {
    if (consumers_[c] == name) return c;
  }
  return -1;
}

bool Table::track(const std::string& consumer) {
  std::unique_lock<std::shared_mutex> hold(lock_);
  int c = consumer_of(consumer);
  if (c < 0) c = consumer_of("");
  if (c < 0) return false;
  consumers_[c] = consumer;
  progress_[c] = {true, 0, 0};
  shape_.followers |= 1u << c;
  return true;
}

bool Table::untrack(const std::string& consumer) {
  std::unique_lock<std::shared_mutex> hold(lock_);
  const int c = consumer_of(consumer);
  if (c < 0) return false;
  consumers_[c].clear();
  shape_.followers &= ~(1u << c);
  if (shape_.followers != 0) return true;
  for (Stripe& stripe : stripes_) {
    stripe.deleted_start += stripe.deleted.size();
    std::vector<int64_t>().swap(stripe.deleted);
  }
  return true;
}

bool Table::changes(const std::string& consumer, int64_t limit, Changes* changes) {
  std::unique_lock<std::shared_mutex> hold(lock_);
  const int c = consumer_of(consumer);
  if (c < 0) return false;
  if (!follow(c, limit, changes)) {
    *changes = {};
    progress_[c] = {true, 0, 0};
    follow(c, limit, changes);
  }
  return true;
}

// False: the log of deletions has overtaken the consumer on the way.
bool Table::follow(int c, int64_t limit, Changes* changes) {
  const uint32_t mark = 1u << c;
  Progress& progress = progress_[c];
  for (const Stripe& stripe : stripes_) progress.restart |= stripe.read_to[c] < stripe.deleted_start;
  changes->restart = progress.restart;
  changes->step = step_;

  const auto take_deleted = [&](Stripe& stripe) {
    const uint64_t end = stripe.deleted_start + stripe.deleted.size();
    if (!changes->restart) {
      changes->deleted.insert(changes->deleted.end(), stripe.deleted.end() - static_cast<int64_t>(end - stripe.read_to[c]), stripe.deleted.end());
    }
    stripe.read_to[c] = end;
    uint64_t all = end;
    for (int other = 0; other < kConsumersMax; other++) {
      if (shape_.followers >> other & 1 && !progress_[other].restart) all = std::min(all, stripe.read_to[other]);
    }
    if (all == end) {
      stripe.deleted.clear();
      stripe.deleted_start = end;
    }
  };
  // Deletions of all stripes, whatever the limit: so whoever follows never holds a row that is not here, nor more than fit.
  for (Stripe& stripe : stripes_) {
    if (progress.restart) {
      for (uint32_t n = 0; n < stripe.used(); n++) stripe.row(n)->marks |= mark;
      for (uint32_t u = 0; u < stripe.units(); u++) stripe.unit(u).all |= static_cast<uint8_t>(mark);
    }
    take_deleted(stripe);
  }

  const Progress begin = progress;
  progress = {true, 0, 0};  // should this fail, what was taken is lost
  for (int i = 0; i < settings_.stripes + (begin.row > 0) && !changes->more; i++) {  // the first one's beginning comes last
    const int b = (begin.stripe + i) % settings_.stripes;
    Stripe& stripe = stripes_[static_cast<size_t>(b)];
    expire(stripe, 0, stripe.used());
    if (disk_ != nullptr) expire_spilled(stripe);
    if (!changes->restart && stripe.read_to[c] < stripe.deleted_start) return false;
    take_deleted(stripe);
    const int64_t end = changes_of(stripe, mark, i == 0 ? begin.row : 0, limit, &changes->written);
    if (end < 0) continue;
    progress = {true, b, end};
    changes->more = true;
  }
  progress.restart = false;
  return true;
}

// Takes the rows that are marked, and takes the mark from them.
int64_t Table::changes_of(Stripe& stripe, uint32_t mark, int64_t from, int64_t limit, Rows* to) {
  for (int64_t n = from; n < stripe.used(); n++) {
    Header* row = stripe.row(static_cast<uint32_t>(n));
    if (row->is_free() || !(row->marks & mark)) continue;
    if (static_cast<int64_t>(to->ids.size()) >= limit) return n;
    row->marks &= ~mark;
    copy_row(*row, row->values(), width(), to);
  }
  const bool is_all = disk_ == nullptr || changes_spilled(stripe, mark, limit, to);
  return is_all ? -1 : static_cast<int64_t>(shape_.spill_base);
}

}  // namespace headwater
