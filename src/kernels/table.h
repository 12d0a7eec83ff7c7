// A table: 256 buckets, worked on by threads; the row policy; the delta stream.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <shared_mutex>
#include <string>
#include <vector>

#include "bucket.h"
#include "rows.h"
#include "slabs.h"

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
  int first_bucket, bucket_limit;
  int threads;
  const RowLevel* level;
};

struct Rows {  // copies of rows
  std::vector<int64_t> ids;
  std::vector<float> values;  // (k, dim + slots)
  std::vector<float> counts;
  std::vector<int64_t> last_seen;
  int64_t next = -1;
};

struct Changes {
  Rows written;
  std::vector<int64_t> deleted;
  bool restart = false, more = false;
};

struct TableStats {
  int64_t rows, bytes, budget_bytes, rows_max, step;
  int64_t admitted, refused, evicted, expired, deleted, hits, misses;
};

constexpr int64_t kStepMax = 0xfffffffe;  // the largest step, and the largest time in seconds

// It can be shared between threads: calls that change rows exclude each other and readers. Arguments are checked by the caller.
class Table {
 public:
  // Throws std::invalid_argument for a budget that is too small.
  explicit Table(const TableSettings& settings);

  int64_t width() const { return settings_.dim + static_cast<int64_t>(settings_.initial_slots.size()); }
  const TableSettings& settings() const { return settings_; }
  int64_t step() const { return step_; }
  int64_t rows_max() const;  // 0: no limit

  int64_t pull(const int64_t* ids, int64_t count, float* out, bool touch, int64_t now, bool prefetch);
  void push(const int64_t* ids, int64_t count, const float* gradients, const float* scalars, int64_t step, int64_t now);
  void put(const int64_t* ids, int64_t count, const float* rows, const float* counts, const int64_t* last_seen, int64_t step, int64_t now);
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
  // Brings step and clock up to what the caller says; neither ever goes back. Returns the clock: steps or seconds.
  uint32_t advance(int64_t step, int64_t now);
  uint64_t key_of(uint64_t hash) const { return mix64(hash ^ start_.seed); }

  int64_t set_shape(int64_t budget);
  void plan_budget();
  int64_t bytes_unlocked();
  template <bool prefetch>
  int64_t pull_part(const int64_t* ids, int64_t count, float* out, bool touch, uint32_t clock) const;
  Found obtain(Bucket& bucket, uint64_t hash, int64_t id, const Bucket::Sight& sight, uint32_t clock, bool admit, bool* is_new);
  template <class Visit>
  void visit(const int64_t* ids, int64_t count, const float* data, int64_t width, Visit visit);
  void copy_row(const Header* row, Rows* to) const;
  int64_t expire(Bucket& bucket);
  int consumer_of(const std::string& name) const;

  const TableSettings settings_;
  Start start_;
  StepRow step_row_;
  Shape shape_ = {};
  std::unique_ptr<Slabs> slabs_;
  std::vector<Bucket> buckets_;  // all 256; those that live elsewhere stay empty

  std::shared_mutex lock_;  // whoever changes rows holds it alone
  std::atomic<int64_t> step_{0};
  std::atomic<uint32_t> clock_{0};
  std::atomic<int64_t> hits_{0}, misses_{0};
  int sweep_next_ = 0;  // bucket
  std::string consumers_[kConsumersMax];  // by bit of `marks`; empty: free
  struct Progress {
    bool restart = false;
    int bucket = -1;       // where the next call goes on, when there was more
  } progress_[kConsumersMax];
};

}  // namespace headwater
