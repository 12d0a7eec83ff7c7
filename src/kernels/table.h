// A table: stripes, worked on by threads; the row policy; the delta stream.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <thread>
#include <vector>

#include "stripe.h"
#include "disk.h"
#include "rows.h"

namespace headwater {

struct TableSettings {
  int64_t dim;
  RowRule rule;
  std::vector<float> initial_slots;
  uint64_t seed;
  Initial initial;
  double scale;
  uint32_t admit_after;
  uint32_t expire_after;  // steps or seconds; 0: never
  bool expires_by_time;
  double decay;
  int64_t budget_bytes;  // 0: no limit
  Victim victim;
  bool spills;
  std::string spill_folder;
  int first_bucket, bucket_limit;  // whose ids live here
  int stripes;  // a power of two
  int threads;
  const RowLevel* level;
};

struct Rows {  // copies of rows
  std::vector<int64_t> ids;
  std::vector<float> values;  // (k, dim + slots)
  std::vector<float> counts;
  std::vector<int64_t> last_seen;
  int64_t next = -1;

  void reserve(int64_t count, int64_t width) {
    const size_t rows = static_cast<size_t>(count);
    ids.reserve(rows);
    values.reserve(rows * static_cast<size_t>(width));
    counts.reserve(rows);
    last_seen.reserve(rows);
  }
};

struct Changes {
  Rows written;
  std::vector<int64_t> deleted;
  int64_t step = 0;  // of the table, which is what counts are up to date with
  bool restart = false, more = false;
};

struct TableStats {
  int64_t rows, spilled_rows, bytes, budget_bytes, spilled_bytes, rows_max, step;
  int64_t admitted, refused, evicted, expired, deleted, spilled, loaded, hits, misses;
};

constexpr int64_t kDecaySteps = 1000;
constexpr int64_t kStepMax = 0xfffffffe;  // the largest step, and the largest time in seconds

// It can be shared between threads: calls that change rows exclude each other and readers. Arguments are checked by the caller.
class Table {
 public:
  // Throws std::invalid_argument for a budget that is too small, std::system_error when there can be no file to spill to.
  explicit Table(const TableSettings& settings);
  ~Table();

  int64_t width() const { return settings_.dim + static_cast<int64_t>(settings_.initial_slots.size()); }
  const TableSettings& settings() const { return settings_; }
  int64_t step() const { return step_; }
  int64_t rows_max() const;  // 0: no limit

  // numbers: null, or where a pull says which number each id's row has, and a push of the same ids finds that.
  int64_t pull(const int64_t* ids, int64_t count, float* out, uint32_t* numbers, bool touch, int64_t now, bool prefetch);
  void push(const int64_t* ids, int64_t count, const float* gradients, const float* scalars, const uint32_t* numbers, int64_t step, int64_t now);
  void put(const int64_t* ids, int64_t count, const float* rows, const float* counts, const int64_t* last_seen, int64_t step, int64_t now);
  void prefetch(const int64_t* ids, int64_t count);
  int64_t erase(const int64_t* ids, int64_t count);
  int64_t sweep(int64_t step, int64_t now);
  Rows export_rows(int64_t cursor, int64_t limit);

  // Consumers of the delta stream; false: no such name, or no more room for it.
  bool track(const std::string& consumer);
  bool untrack(const std::string& consumer);
  bool changes(const std::string& consumer, int64_t limit, Changes* changes);

  TableStats stats();
  int64_t bytes();

 private:
  struct Batch;
  class Sorted;

  bool has_expired(uint32_t last, uint32_t clock) const {
    return settings_.expire_after > 0 && clock > last && clock - last > settings_.expire_after;
  }
  void decay();
  // Brings step and clock up to what the caller says; neither ever goes back. Whoever brings a later step holds the lock alone.
  // Returns the clock: steps or seconds.
  uint32_t advance(int64_t step, int64_t now);
  // By bits of the hash that nothing else looks at.
  int stripe_of(uint64_t hash) const { return static_cast<int>(hash) & (settings_.stripes - 1); }
  const Stripe& stripe_at(uint64_t hash) const { return stripes_[static_cast<size_t>(stripe_of(hash))]; }
  uint64_t key_of(uint64_t hash) const { return mix64(hash ^ start_.seed); }

  void set_limits(int64_t budget);
  void make_addresses(int64_t rows);
  void plan_budget();
  int64_t fixed_bytes() const;
  // That are brought in at a time ahead of their use.
  int64_t warm_rows() const { return std::max<int64_t>(16, (128 << 10) / shape_.row_bytes); }
  int64_t bytes_unlocked();
  enum class Seen { row, nothing, later };
  struct LookedUp {
    int64_t rows = 0;
    std::vector<int64_t> later;
  };
  template <bool prefetch, class Use>
  LookedUp look_up(const int64_t* ids, int64_t count, const uint32_t* numbers, int64_t bytes, Use use) const;
  template <bool prefetch>
  LookedUp pull_all(const int64_t* ids, int64_t count, float* out, uint32_t* numbers, bool touch, uint32_t clock) const;
  Found obtain(Stripe& stripe, int64_t id, const Stripe::Sight& sight, uint32_t clock, bool admit, bool* is_new);
  void put_part(const int64_t* ids, int64_t count, const float* rows, const float* counts, const int64_t* last_seen, uint32_t clock);
  template <class Visit>
  void visit(const int64_t* ids, int64_t count, const int64_t* some, const float* data, int64_t width, Visit visit);
  static void copy_row(const Header& header, const float* values, int64_t width, Rows* to);
  int64_t expire(Stripe& stripe, uint32_t first, uint32_t limit);
  int consumer_of(const std::string& name) const;
  bool follow(int consumer, int64_t limit, Changes* changes);
  int64_t changes_of(Stripe& stripe, uint32_t mark, int64_t from, int64_t limit, Rows* to);  // -1, or where it ended at the limit

  // ---- spilling (table_spill.cpp) ----
  struct Need;
  struct Want;
  struct Wants;
  Stripe& stripe_at(uint64_t hash) { return stripes_[static_cast<size_t>(stripe_of(hash))]; }
  // Spills rows until there is room. When that fails, nothing has changed but where rows lie.
  void make_room(const std::vector<Need>& needs);
  // Brings rows of ids that are about to be written into memory, with room for those that will be new.
  void gather(const int64_t* ids, int64_t count, bool admit);
  // How many of the ids, from the first on, can be brought in together: pages come by stripe, so one may get them all.
  int64_t fitting(const int64_t* ids, int64_t count);
  void unpin(const int64_t* ids, int64_t count);
  int64_t pull_spilled(const int64_t* ids, const std::vector<int64_t>& which, float* out, bool touch, uint32_t clock);
  int64_t erase_spilled(const int64_t* ids, int64_t count);
  int64_t expire_spilled(Stripe& stripe);
  bool export_spilled(int64_t stripe, int64_t from, int64_t limit, Rows* to);  // false: the limit is reached
  bool changes_spilled(Stripe& stripe, uint32_t mark, int64_t limit, Rows* to);  // likewise
  // Reads the units of wants, and calls take(want, stored row) for each whose id is at its place.
  template <class Take>
  void read_wanted(const Wants& wants, Take take);
  std::vector<uint32_t> files_of(const Wants& wants) const;
  // Reads units and calls take(index, buffer) for each as it comes.
  void read_units(const std::vector<std::pair<Stripe*, uint32_t>>& units, const std::function<void(int64_t, const char*)>& take);
  void give_unit(uint32_t file) { if (file != kNone) disk_->give(file); }
  void warm();
  void warm_batch(const std::vector<int64_t>& ids);

  const TableSettings settings_;
  Start start_;
  StepRow step_row_;
  Shape shape_ = {};
  std::unique_ptr<Addresses> addresses_;
  int64_t addressed_rows_ = 0;  // of a stripe, that there are addresses for
  std::vector<Stripe> stripes_;

  std::shared_mutex lock_;  // whoever changes rows holds it alone
  std::atomic<int64_t> step_{0};
  uint64_t period_ = 0;  // that counts are up to date with
  std::atomic<uint32_t> clock_{0};
  std::atomic<int64_t> hits_{0}, misses_{0};
  int sweep_stripe_ = 0;   // where the next sweep goes on
  uint32_t sweep_row_ = 0;
  std::string consumers_[kConsumersMax];  // by bit of `marks`; empty: free
  struct Progress {
    bool restart = false;
    int stripe = 0;        // where the next call goes on
    int64_t row = 0;
  } progress_[kConsumersMax];

  std::unique_ptr<Disk> disk_;
  // The thread that brings in what will be wanted.
  std::thread warmer_;
  std::mutex warming_;  // guards what follows
  std::condition_variable has_batch_;
  std::deque<std::vector<int64_t>> batches_;
  bool is_closing_ = false;
};

}  // namespace headwater
