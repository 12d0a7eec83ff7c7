// One bucket of a table: an index by id, rows in chunks, and the counters of ids that have no row yet. No locks, no threads.
//
// Index: lines of 64 bytes, fifteen slots each. A slot is a row number below a tag of hash bits, never 0: as many as the largest
// number leaves of 32, so that hardly ever another id's row is looked at; 0 is free. An id's home is the line that its hash falls in; when that is full, it goes to the next with room, and `passed` of every
// line on the way is raised by one. So a search ends at the first line that nobody passed, and nothing is left behind by a
// deletion. Lines hold 13 rows on average at most and grow by a quarter.
//
// A row: Header, `dim` values, `slots` floats of state. Row number n lies in chunk n >> shift. Rows in use and free ones have
// numbers below `used`; the free ones are a chain.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "ids.h"
#include "slabs.h"

namespace headwater {

constexpr uint32_t kNone = 0xffffffffu;         // no row of this number, no time of this kind
constexpr uint32_t kRowsMax = 1u << 23;         // of a bucket, in memory
constexpr uint32_t kSighting = 16;              // counts are in sixteenths
constexpr uint32_t kCountMax = (1u << 24) - 1;  // in sixteenths
constexpr int kConsumersMax = 8;
constexpr int kDraws = 16, kVictims = 4;  // rows that are drawn at a time, and how many of them go
constexpr int64_t kRowBytesAhead = 512;  // of a row, that is asked for ahead of its use; the CPU sees by itself how it goes on

struct __attribute__((packed, aligned(4))) Header {
  int64_t id;
  uint32_t last;   // seen; kNone: the row is free, and `id` is the number of the next free one
  uint32_t marks;  // count << 8 | the consumers that have not got this row as it is now

  uint32_t count() const { return marks >> 8; }
  void set_count(uint32_t count) { marks = count << 8 | (marks & 0xffu); }
  bool is_free() const { return last == kNone; }
  float* values() { return reinterpret_cast<float*>(this + 1); }
};
static_assert(sizeof(Header) == 16, "what a row costs beside value and state");

enum class Victim { lru, lfu };

// What all buckets of a table have in common.
struct Shape {
  int64_t dim, slots;
  int64_t row_bytes, chunk_bytes;
  int shift;  // a chunk has 1 << shift rows
  Victim victim;
  uint64_t seed;
  uint32_t followers;  // a bit for each consumer of the delta stream
  // Limits of one bucket, so that together with a region's slack they stay below the budget; INT64_MAX: none.
  int64_t quota;             // bytes, everything but the log of deletions
  int64_t chunks_max, lines_max;
  int64_t candidates_bytes;  // −1: an eighth of the rows' bytes
  int64_t deleted_max;       // ids in the log of deletions; −1: an eighth of the rows
  int64_t chunk_cost;        // bytes, its share of what regions lose to rounding included
};

struct alignas(64) Line {
  uint32_t passed;  // ids whose home is this line or before, and which lie beyond it
  uint32_t slots[15];
};

struct Found {
  uint32_t number = kNone;
  Header* row = nullptr;
};

// Sightings of ids without a row: open addressing, the next free place, holes closed at once.
class Candidates {
 public:
  // Counts a sighting and returns the count, in sixteenths. Past `bytes_max` the least seen of eight neighbours makes room.
  uint32_t see(int64_t id, uint64_t hash, uint32_t clock, int64_t bytes_max);
  void forget(int64_t id, uint64_t hash);
  void decay(double factor, uint64_t times);
  int64_t bytes() const { return static_cast<int64_t>(entries_.size() * sizeof(Entry)); }
  uint32_t last_seen(int64_t id, uint64_t hash) const;  // kNone: never

 private:
  struct Entry {
    int64_t id;
    uint32_t last;  // kNone: free
    uint32_t count;
  };
  size_t find(int64_t id, uint64_t hash) const;  // its place, or the free place where it would be
  size_t home(uint64_t hash) const { return static_cast<size_t>(hash >> 16) & (entries_.size() - 1); }
  void remove(size_t place);
  void grow(size_t places);
  std::vector<Entry> entries_;  // none or a power of two
  size_t used_ = 0;
};

class alignas(64) Bucket {
 public:
  void init(const Shape* shape, Slabs* slabs, int number);

  Header* row(uint32_t number) const {
    char* chunk = chunks_[number >> shape_->shift];
    return reinterpret_cast<Header*>(chunk + (number & ((1u << shape_->shift) - 1)) * shape_->row_bytes);
  }
  uint32_t used() const { return used_; }
  int64_t rows() const { return rows_; }
  int64_t bytes() const;  // all but the rows, which lie in slabs

  // Three looks ahead, each at what the one before has asked for: the line of an id's home; its row, or the next line when the
  // home was full; and then the row that the next line has. `bytes` of a row are asked for.
  struct Sight {
    Found found;             // most likely the id's
    bool is_passed = false;  // a third look may find it
  };
  __attribute__((always_inline)) void prefetch_line(uint64_t hash) const { __builtin_prefetch(&lines_[home(hash)]); }
  // Written field by field: a copy of it would have to wait for its parts.
  void prefetch_row(uint64_t hash, int64_t bytes, Sight* sight) const {
    const int64_t at = home(hash);
    prefetch_match(lines_[at], hash, bytes, sight);
    sight->is_passed = sight->found.row == nullptr && lines_[at].passed != 0;
    if (sight->is_passed) __builtin_prefetch(&lines_[next(at)]);
  }
  void prefetch_passed_row(uint64_t hash, int64_t bytes, Sight* sight) const {
    if (sight->is_passed) prefetch_match(lines_[next(home(hash))], hash, bytes, sight);
  }

  Found find(uint64_t hash, int64_t id, const Sight& sight) const {
    const Header* row = sight.found.row;
    return row != nullptr && row->id == id && !row->is_free() ? sight.found : find(hash, id);
  }
  Found find(uint64_t hash, int64_t id) const {
    const uint32_t tag = tag_of(hash);
    int64_t at = home(hash);
    for (int64_t seen = 0; seen < line_count_; seen++) {
      const Line& line = lines_[at];
      for (uint32_t mask = match(line, tag); mask != 0; mask &= mask - 1) {
        const uint32_t number = line.slots[__builtin_ctz(mask)] & numbers_;
        Header* const found = row(number);
        if (found->id == id) return {number, found};
      }
      if (line.passed == 0) break;
      at = next(at);
    }
    return {};
  }

  // Makes a row for an id that has none; value and state are garbage, its count 0, no marks. At the limit another row goes
  // first. Throws std::bad_alloc, or std::length_error past kRowsMax; then nothing has changed.
  Found insert(uint64_t hash, int64_t id, uint32_t clock);
  void remove(Found found);

  // Multiplies all counts by `factor`, once for each period that has passed.
  void decay(double factor, uint64_t period);

  Candidates candidates;

  // The ids of rows that are gone, for whoever follows: their numbers in the stream begin with deleted_start. When the log is
  // full it begins anew, and whoever has not read it all must start over.
  std::vector<int64_t> deleted;
  uint64_t deleted_start = 0;
  uint64_t read_to[kConsumersMax] = {};

  // Since the beginning:
  int64_t admitted = 0, refused = 0, evicted = 0, expired = 0, dropped = 0;

 private:
  int64_t home(uint64_t hash) const {
    return static_cast<int64_t>((hash >> 24 & 0xffffffffu) * static_cast<uint64_t>(line_count_) >> 32);
  }
  int64_t next(int64_t line) const { return line + 1 == line_count_ ? 0 : line + 1; }
  void prefetch_match(const Line& line, uint64_t hash, int64_t bytes, Sight* sight) const {
    const uint32_t mask = match(line, tag_of(hash));
    sight->found.row = nullptr;
    if (mask == 0) return;
    const uint32_t number = line.slots[__builtin_ctz(mask)] & numbers_;
    sight->found.number = number;
    sight->found.row = row(number);
    const char* start = reinterpret_cast<const char*>(sight->found.row);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(start + at);
    __builtin_prefetch(start + bytes - 1);
  }
  uint32_t tag_of(uint64_t hash) const {
    const uint32_t tag = static_cast<uint32_t>(hash) & ~numbers_;
    return tag != 0 ? tag : numbers_ + 1;
  }

  // Bit i: slot i has this tag.
  uint32_t match(const Line& line, uint32_t tag) const {
#if defined(__SSE2__)
    const __m128i* four = reinterpret_cast<const __m128i*>(&line);
    const __m128i tags = _mm_set1_epi32(static_cast<int>(tag)), high = _mm_set1_epi32(static_cast<int>(~numbers_));
    const auto same = [&](int i) { return _mm_cmpeq_epi32(_mm_and_si128(_mm_load_si128(four + i), high), tags); };
    const __m128i low = _mm_packs_epi32(same(0), same(1)), upper = _mm_packs_epi32(same(2), same(3));
    return static_cast<uint32_t>(_mm_movemask_epi8(_mm_packs_epi16(low, upper))) >> 1;
#else
    uint32_t mask = 0;
    for (int i = 0; i < 15; i++) mask |= static_cast<uint32_t>((line.slots[i] & ~numbers_) == tag) << i;
    return mask;
#endif
  }

  void add_to_index(uint64_t hash, uint32_t number);
  void remove_from_index(uint64_t hash, uint32_t number);
  bool grow_index();  // false: the quota does not allow it
  bool grow_rows();   // likewise
  int64_t charged() const;
  void make_room();
  void ask_for(const Header* row) const;
  void draw_rows();
  void choose_victims();

  struct Free {
    void operator()(Line* lines) const { std::free(lines); }
  };

  const Shape* shape_ = nullptr;
  Slabs* slabs_ = nullptr;
  int number_ = 0;
  std::unique_ptr<Line[], Free> lines_;
  int64_t line_count_ = 0;
  uint32_t numbers_ = 0xff;  // the bits of a slot that are a row number
  std::vector<char*> chunks_;
  uint32_t used_ = 0, free_ = kNone;
  int64_t rows_ = 0;
  uint64_t decayed_ = 0;  // periods
  uint64_t draws_ = 0;
  uint32_t drawn_[kDraws] = {};
  struct {
    uint32_t number, last;
  } victims_[kVictims];
  int victim_count_ = 0;
};

constexpr int64_t kLineRows = 13;  // on average, at most

}  // namespace headwater
