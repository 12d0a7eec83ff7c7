// One stripe of a table, 1/64 of its rows by hash: an index by id, the rows, and the counters of ids that have no row yet. No locks,
// no threads.
//
// Index: lines of 64 bytes, fifteen slots each. A slot is a row number below a tag of hash bits, never 0: as many as the largest
// number leaves of 32, so that hardly ever another id's row is looked at; 0 is free. An id's home is the line that its hash falls in; when that is full, it goes to the next with room, and `passed` of every
// line on the way is raised by one. So a search ends at the first line that nobody passed, and nothing is left behind by a
// deletion. Lines hold 13 rows on average at most and grow by a quarter,
// with rows on disk by a sixteenth.
//
// A row: Header, `dim` values, `slots` floats of state. They lie one after the other, by number. Rows in use and free ones have numbers
// below `used`; the free ones are a chain.
//
// A spilled row lies in a place of a unit on disk. Its number is spill_base + unit · unit_rows + place; in memory it costs a slot
// of the index and 32 bits of its hash, without which the index could not be made anew.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "ids.h"
#include "range.h"

namespace headwater {

constexpr uint32_t kNone = 0xffffffffu;         // no row of this number, no time of this kind
constexpr int kStripesMax = 64;                 // of a table
constexpr uint32_t kRowsMax = 1u << 25;         // of a stripe, in memory
constexpr uint32_t kSighting = 16;              // counts are in sixteenths
constexpr uint32_t kCountMax = (1u << 24) - 1;  // in sixteenths
constexpr int kConsumersMax = 6;
// Among the marks: must not leave memory before the batch at hand is through; had better not, for it will be wanted soon.
constexpr uint32_t kPinned = 0x80, kWarm = 0x40, kOfConsumers = (1u << kConsumersMax) - 1;
constexpr int kDraws = 16, kVictims = 4;  // rows that are drawn at a time, and how many of them go
constexpr int64_t kRowBytesAhead = 512;  // of a row, that is asked for ahead of its use; the CPU sees by itself how it goes on

struct __attribute__((packed, aligned(4))) Header {
  int64_t id;
  uint32_t last;   // seen; kNone: the row is free, and `id` is the number of the next free one
  uint32_t marks;  // count << 8 | kPinned | kWarm | the consumers that have not got this row as it is now

  uint32_t count() const { return marks >> 8; }
  void set_count(uint32_t count) { marks = count << 8 | (marks & 0xffu); }
  bool is_free() const { return last == kNone; }
  float* values() { return reinterpret_cast<float*>(this + 1); }
};
static_assert(sizeof(Header) == 16, "what a row costs beside value and state");

enum class Victim { lru, lfu };

// What all stripes of a table have in common.
struct Shape {
  int64_t dim, slots;
  int64_t row_bytes;
  Victim victim;
  uint64_t seed;
  uint32_t followers;  // a bit for each consumer of the delta stream
  // Limits of one stripe, so that together they stay below the budget.
  int64_t quota;             // bytes, everything but the log of deletions; INT64_MAX / 2: none
  int64_t rows_max, lines_max;
  int64_t candidates_bytes;  // −1: an eighth of the rows' bytes
  int64_t deleted_max;       // ids in the log of deletions; −1: an eighth of the rows
  // Spilling; spill_base kNone: there is none.
  uint32_t spill_base;
  int64_t unit_bytes, unit_rows;
  double decay;
};

struct alignas(64) Line {
  uint32_t passed;  // ids whose home is this line or before, and which lie beyond it
  uint32_t slots[15];
};

// A count after so many decays, each rounded down to a sixteenth.
uint32_t decayed_count(uint32_t count, double factor, uint64_t times);

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
  uint32_t count(int64_t id, uint64_t hash) const { return entries_.empty() ? 0 : entries_[find(id, hash)].count; }

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

// Rows on disk that were written together.
struct Unit {
  std::unique_ptr<uint32_t[]> hashes;  // by place; 0: nobody's
  uint32_t file = 0;        // where in the file
  uint32_t generation = 0;  // how often it was written
  uint32_t oldest = kNone;  // of the rows' last seen, the earliest
  uint32_t period = 0;      // when counts were up to date
  uint16_t live = 0;        // rows
  bool is_moving = false;
  // Of consumers: whose marks in the rows hold still; for whom all rows are marked; for whom some may be.
  uint8_t valid = 0, all = 0, some = 0;

  void unmark(uint32_t mark) {
    const uint8_t others = static_cast<uint8_t>(~mark);
    valid &= others;
    all &= others;
    some &= others;
  }
};

// A unit that is about to be written: rows of a sparse unit first, then rows from memory.
struct Page {
  uint32_t file = 0;
  uint32_t moved = kNone;  // unit
  std::vector<uint32_t> rows;
};

class alignas(64) Stripe {
  struct Free {
    void operator()(Line* lines) const { std::free(lines); }
  };
  // What every lookup reads, in one line of the cache.
  const Shape* shape_ = nullptr;
  std::unique_ptr<Line[], Free> lines_;
  int64_t line_count_ = 0;
  uint32_t numbers_ = 0xff;  // the bits of a slot that are a row number
  int number_bits_ = 8;      // how many
  char* base_ = nullptr;   // of the rows

 public:
  void init(const Shape* shape, int number);
  // Rows lie there from now on, where `bytes` of them have addresses.
  void move_rows(char* rows, int64_t bytes, bool is_open) {
    range_.move(rows, bytes, is_open);
    base_ = rows;
  }
  int64_t row_bytes_held() const { return range_.bytes(); }

  Header* row(uint32_t number) const {
    return reinterpret_cast<Header*>(base_ + static_cast<int64_t>(number) * shape_->row_bytes);
  }
  uint32_t used() const { return used_; }
  int64_t rows() const { return rows_; }
  int64_t bytes() const;

  // Three looks ahead, each at what the one before has asked for: the line of an id's home; the beginning of its row, or the next line
  // when the home was full; the row's other bytes, or all of who was in that next line. Whoever knows most likely a row's number begins with
  // look_for_row. Only one line of a row is asked for at first, for that may have to wait until its page is found, and the
  // others would, too.
  struct Sight {
    uint64_t hash;
    const Stripe* stripe;
    int64_t line;     // the home, by its place, for the index may have grown by the next look; −1: no need to look on
    Header* row;      // most likely the id's, or null
    uint32_t number;  // the row's
  };
  __attribute__((always_inline)) void ask_for_line(uint64_t hash) const { __builtin_prefetch(&lines_[home(short_of(hash))]); }
  void look_at_line(uint64_t hash, Sight* sight) const {
    sight->hash = hash;
    sight->stripe = this;
    sight->line = home(short_of(hash));
    __builtin_prefetch(&lines_[sight->line]);
  }
  void look_for_row(Sight* sight) const {
    const Line& line = lines_[sight->line];
    if (see_row(number_in(line, tag_of(short_of(sight->hash))), shape_->spill_base, sight)) sight->line = -1;
    else if (line.passed != 0) __builtin_prefetch(&lines_[next(sight->line)]);
    else sight->line = -1;
  }
  void look_for_row(uint64_t hash, uint32_t number, Sight* sight) const {
    sight->hash = hash;
    sight->stripe = this;
    sight->line = -1;
    see_row(number, used_, sight);
  }
  void look_at_row(int64_t bytes, Sight* sight) const {
    if (sight->line >= 0) see_row(number_in(lines_[next(sight->line)], tag_of(short_of(sight->hash))), shape_->spill_base, sight);
    if (sight->row == nullptr) return;
    const char* start = reinterpret_cast<const char*>(sight->row);
    for (int64_t at = 64; at < bytes; at += 64) __builtin_prefetch(start + at);
    __builtin_prefetch(start + bytes - 1);
  }

  Found find(int64_t id, const Sight& sight) const {
    Header* row = sight.row;
    return row != nullptr && row->id == id && !row->is_free() ? Found{sight.number, row} : find(sight.hash, id);
  }
  Found find(uint64_t hash, int64_t id) const {
    Found found;
    each_number(short_of(hash), [&](uint32_t number) {
      if (number >= shape_->spill_base || row(number)->id != id) return true;
      found = {number, row(number)};
      return false;
    });
    return found;
  }

  // Makes a row for an id that has none; value and state are garbage, its count 0, no marks. At the limit another row goes
  // first. Throws std::bad_alloc, or std::length_error past kRowsMax; then nothing has changed.
  Found insert(uint64_t hash, int64_t id, uint32_t clock);
  void remove(Found found);

  // ---- spilling (stripe_spill.cpp) ----
  int64_t spilled() const { return spilled_; }
  // Calls visit(number) for the spilled rows that may be this id's: hardly ever more than its own.
  template <class Visit>
  void each_spilled(uint64_t hash, Visit visit) const {
    if (spilled_ == 0) return;
    const uint32_t low = short_of(hash);
    each_number(low, [&](uint32_t number) {
      if (number >= shape_->spill_base && unit_of(number).hashes[place_of(number)] == low) visit(number);
      return true;
    });
  }
  Unit& unit_of(uint32_t number) { return units_[(number - shape_->spill_base) / shape_->unit_rows]; }
  const Unit& unit_of(uint32_t number) const { return units_[(number - shape_->spill_base) / shape_->unit_rows]; }
  int64_t place_of(uint32_t number) const { return (number - shape_->spill_base) % shape_->unit_rows; }
  uint32_t number_of(uint32_t unit, int64_t place) const {
    return shape_->spill_base + static_cast<uint32_t>(unit * shape_->unit_rows + place);
  }
  uint32_t units() const { return static_cast<uint32_t>(units_.size()); }
  Unit& unit(uint32_t unit) { return units_[unit]; }

  // How many rows must leave memory before `rows` more can come in, `entries` of them new to the index.
  int64_t rows_over(int64_t rows, int64_t entries) const;
  // Chooses rows, none of them pinned, for one page; pins them. None: there is nobody.
  Page choose_page(int64_t wanted);
  // Writes a page's rows to `buffer`; `moved`: what its unit has on disk.
  void fill_page(const Page& page, const char* moved, char* buffer) const;
  // The page is on disk: its rows lie there from now on. Returns the file's unit that is free now, or kNone.
  uint32_t settle_page(const Page& page);
  void drop_page(const Page& page);  // or it is not
  // Makes room in memory as rows_over has promised: gives back pages of rows, grows the index.
  void settle_room(int64_t entries);
  // A spilled row, at `stored`, comes back to memory, where there is room. Returns the file's unit that is free now, or kNone.
  uint32_t bring_in(uint32_t number, const Header* stored, uint32_t marks, Found* found);
  // A spilled row is deleted; likewise.
  uint32_t remove_spilled(uint32_t number, const Header* stored);
  // What the header of a spilled row would be by now, marks included.
  Header header_now(uint32_t number, const Header* stored, double factor) const;

  // Multiplies all counts by `factor`, once for each period that has passed.
  void decay(double factor, uint64_t period);

  Candidates candidates;

  // The ids of rows that are gone, for whoever follows: their numbers in the stream begin with deleted_start. When the log is
  // full its older half goes, and whoever has not read that must start over.
  std::vector<int64_t> deleted;
  uint64_t deleted_start = 0;
  uint64_t read_to[kConsumersMax] = {};

  // Since the beginning:
  int64_t admitted = 0, refused = 0, evicted = 0, expired = 0, dropped = 0, written = 0, loaded = 0;

 private:
  // Home and tag come from the same 32 bits, the one from their top and the other from their end, and never meet: a tag has
  // as many bits as a row number leaves. Never 0.
  static uint32_t short_of(uint64_t hash) {
    const uint32_t low = static_cast<uint32_t>(hash >> 24);
    return low + (low == 0);
  }
  int64_t home(uint32_t hash) const { return static_cast<int64_t>(hash * static_cast<uint64_t>(line_count_) >> 32); }
  // Calls visit(number) for the slots that an id with this hash may have, until it returns false.
  template <class Visit>
  void each_number(uint32_t hash, Visit visit) const {
    const uint32_t tag = tag_of(hash);
    int64_t at = home(hash);
    for (int64_t seen = 0; seen < line_count_; seen++) {
      const Line& line = lines_[at];
      for (uint32_t mask = match(line, tag); mask != 0; mask &= mask - 1) {
        if (!visit(line.slots[__builtin_ctz(mask)] & numbers_)) return;
      }
      if (line.passed == 0) return;
      at = next(at);
    }
  }
  int64_t next(int64_t line) const { return line + 1 == line_count_ ? 0 : line + 1; }
  uint32_t tag_of(uint32_t hash) const {
    const uint32_t tag = hash << number_bits_;
    return tag != 0 ? tag : numbers_ + 1;
  }

  // False: there is no row of this number, which is not below the limit.
  bool see_row(uint32_t number, uint32_t limit, Sight* sight) const {
    sight->row = nullptr;
    if (number >= limit) return false;
    sight->number = number;
    sight->row = row(number);
    __builtin_prefetch(sight->row);
    return true;
  }

  // The number in the first slot that has this tag; kNone: none has.
  uint32_t number_in(const Line& line, uint32_t tag) const {
    const uint32_t mask = match(line, tag);
    return mask == 0 ? kNone : line.slots[__builtin_ctz(mask)] & numbers_;
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

  uint32_t* slot_of(uint32_t hash, uint32_t number, bool passes);
  void add_to_index(uint32_t hash, uint32_t number);
  void remove_from_index(uint32_t hash, uint32_t number) { *slot_of(hash, number, true) = 0; }
  void replace_in_index(uint32_t hash, uint32_t number, uint32_t by) { *slot_of(hash, number, false) = tag_of(hash) | by; }
  int64_t entries() const { return rows_ + spilled_; }
  int64_t lines_for(int64_t entries) const;
  bool grow_index();  // false: the quota does not allow it
  void make_index(int64_t lines);
  bool grow_rows();  // likewise
  int64_t charged() const;
  void make_room();
  void ask_for(const Header* row) const;
  void draw_rows();
  void choose_victims();
  uint64_t worth(const Header* row) const;  // who goes first has the least
  void log_deleted(int64_t id);
  void free_row(Found found);
  uint32_t new_unit();
  uint32_t leave_place(uint32_t number);
  void shrink_rows(int64_t capacity);
  int64_t unit_cost() const;
  int64_t units_bytes() const;

  Range range_;
  int64_t capacity_ = 0;  // rows that what is in use of the range holds
  int number_ = 0;
  uint32_t used_ = 0, free_ = kNone;
  int64_t rows_ = 0;
  uint64_t decayed_ = 0;  // periods
  uint64_t draws_ = 0;
  uint32_t drawn_[kDraws] = {};
  struct {
    uint32_t number, last;
  } victims_[kVictims];
  int victim_count_ = 0;
  std::deque<Unit> units_;
  std::vector<uint32_t> free_units_;
  int64_t spilled_ = 0;
};

constexpr int64_t kLineRows = 13;   // on average, at most
constexpr int64_t kPagesAhead = 8;  // that a stripe writes at once; what they cost is kept free

}  // namespace headwater
