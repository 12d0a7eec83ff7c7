#include "ids.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "pool.h"

namespace headwater {
namespace {

constexpr int64_t kAhead = 16;     // how far ahead of its use memory is asked for
constexpr int64_t kBlock = 1024;   // ids
constexpr int64_t kFew = 1 << 18;  // ids

}  // namespace

Unique unique_ids(const int64_t* ids, int64_t count, int servers) {
  const int64_t room = count <= kFew ? 4 : 2;  // places for each id: the more the fewer meet, as long as they lie in a cache
  int bits = 6;
  while (int64_t{1} << bits < room * count) bits++;
  const size_t places = size_t{1} << bits;
  std::vector<int32_t> table(places, -1);  // place → number of the distinct id that hashes there
  // One multiplication: ids come from this process, so nobody has chosen them to meet.
  const auto place_of = [bits](int64_t id) {
    const uint64_t x = static_cast<uint64_t>(id);
    return static_cast<size_t>((x ^ x >> 32) * 0x9e3779b97f4a7c15u >> (64 - bits));
  };

  Unique found;
  found.inverse.resize(static_cast<size_t>(count));
  std::vector<int64_t> distinct(static_cast<size_t>(count));
  int32_t known = 0;
  const auto number_some = [&](int64_t first, int64_t limit, auto guess) {
    const auto number_at = [&](size_t place) {
      const int32_t at = table[place], is_new = at >> 31;
      if constexpr (guess) return at < 0 ? known : at;
      return (at & ~is_new) | (known & is_new);
    };
    for (int64_t i = first; i < limit; i++) {
      if (i + kAhead < count) __builtin_prefetch(&table[place_of(ids[i + kAhead])], 1);
      const int64_t id = ids[i];
      distinct[static_cast<size_t>(known)] = id;  // which stays, if it is new
      size_t place = place_of(id);
      int32_t number = number_at(place);
      while (distinct[static_cast<size_t>(number)] != id) number = number_at(place = (place + 1) & (places - 1));
      table[place] = number;
      found.inverse[static_cast<size_t>(i)] = number;
      known += number == known;
    }
  };
  // A CPU guesses well whether an id is new where nearly all are, or nearly none; else it is better not asked.
  int64_t news = kBlock;
  for (int64_t i = 0; i < count; i += kBlock) {
    const int32_t before = known;
    const int64_t limit = std::min(count, i + kBlock);
    if (news * 16 < kBlock || news * 16 > kBlock * 15) number_some(i, limit, std::true_type());
    else number_some(i, limit, std::false_type());
    news = known - before;
  }
  distinct.resize(static_cast<size_t>(known));

  found.ends.assign(static_cast<size_t>(servers), 0);
  if (servers == 1) {
    found.ends[0] = static_cast<int64_t>(distinct.size());
    found.ids = std::move(distinct);
    return found;
  }
  const auto server_of = [servers](int64_t id) { return static_cast<size_t>(bucket_of(hash_of(id)) * servers / kBuckets); };
  std::vector<int64_t> next(static_cast<size_t>(servers), 0);
  for (int64_t id : distinct) found.ends[server_of(id)]++;
  for (size_t s = 1; s < next.size(); s++) {
    next[s] = found.ends[s - 1];
    found.ends[s] += found.ends[s - 1];
  }
  found.ids.resize(distinct.size());
  std::vector<int32_t> moved(distinct.size());
  for (size_t i = 0; i < distinct.size(); i++) {
    const int64_t to = next[server_of(distinct[i])]++;
    found.ids[static_cast<size_t>(to)] = distinct[i];
    moved[i] = static_cast<int32_t>(to);
  }
  for (int32_t& i : found.inverse) i = moved[static_cast<size_t>(i)];
  return found;
}

// A thread owns a range of the targets and goes through all of the sources: so every sum has one order.
bool sum_rows(const RowSum& sum, int threads, const RowLevel& level) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, sum.count / 4096));
  std::atomic<bool> are_finite{true};
  run_tasks(parts, threads, [&](int64_t part) {
    if (!level.sum(sum, sum.targets_limit * part / parts, sum.targets_limit * (part + 1) / parts)) are_finite = false;
    return true;
  });
  return are_finite;
}

void take_rows(const float* rows, const int32_t* sources, float* out, int64_t count, int64_t dim, int threads) {
  constexpr int64_t part = 4096;
  run_tasks((count + part - 1) / part, threads, [&](int64_t p) {
    const int64_t limit = std::min(count, (p + 1) * part);
    for (int64_t i = p * part; i < limit; i++) {
      if (i + kAhead < limit) __builtin_prefetch(rows + sources[i + kAhead] * dim);
      copy_floats(out + i * dim, rows + sources[i] * dim, dim);
    }
    return true;
  });
}

// Eight bytes at a time; the length keeps texts apart that differ in trailing zeros.
uint64_t hash_text(const char* text, size_t bytes) {
  uint64_t hash = mix64(bytes);
  for (size_t at = 0; at < bytes; at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, text + at, std::min<size_t>(8, bytes - at));
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    hash = mix64(hash ^ word);
  }
  return hash;
}

}  // namespace headwater
