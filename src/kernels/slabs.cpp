#include "slabs.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

namespace headwater {
namespace {

constexpr int64_t kPage = 4096, kHugePage = 2 << 20;
constexpr int64_t kRegionMin = 64 << 10, kRegionMax = 64 << 20;
constexpr int64_t kSlack = 32;  // a region is this part of all there is: so little is allocated and not yet used

int64_t round_up(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }

// Whole chunks; whole huge pages where there is more than one, so that less than a chunk is lost to rounding.
int64_t fit(int64_t target, int64_t chunk_bytes) {
  if (target >= kHugePage) target = target / kHugePage * kHugePage;
  else target = round_up(std::max<int64_t>(1, target / chunk_bytes) * chunk_bytes, kPage);
  return std::max(target, round_up(chunk_bytes, kPage));
}

void* map(int64_t bytes) {
  void* got = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (got == MAP_FAILED) throw std::bad_alloc();
  return got;
}

// Mapped so that huge pages fit: what lies around them is given back.
void* map_aligned(int64_t bytes) {
  if (bytes < kHugePage) return map(bytes);
  char* got = static_cast<char*>(map(bytes + kHugePage));
  char* start = reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(got), kHugePage));
  if (start > got) munmap(got, static_cast<size_t>(start - got));
  const int64_t rest = got + kHugePage - start;
  if (rest > 0) munmap(start + bytes, static_cast<size_t>(rest));
  madvise(start, static_cast<size_t>(bytes), MADV_HUGEPAGE);
  return start;
}

}  // namespace

Slabs::~Slabs() {
  for (const auto& [start, bytes] : regions_) munmap(start, static_cast<size_t>(bytes));
}

int64_t Slabs::region_of(int64_t chunk_bytes, int64_t slack) { return fit(std::min(slack, kRegionMax), chunk_bytes); }

void Slabs::give(char* chunk) {
  std::lock_guard<std::mutex> hold(lock_);
  given_.push_back(chunk);
  madvise(chunk, static_cast<size_t>(chunk_bytes_), MADV_DONTNEED);
  bytes_ -= chunk_bytes_;
}

char* Slabs::take() {
  std::lock_guard<std::mutex> hold(lock_);
  if (!given_.empty()) {
    char* chunk = given_.back();
    given_.pop_back();
    bytes_ += chunk_bytes_;
    return chunk;
  }
  if (left_ == 0) {
    const int64_t grown = std::min(std::max(bytes_ / kSlack, kRegionMin), kRegionMax);
    const int64_t bytes = region_bytes_ > 0 ? region_bytes_ : fit(grown, chunk_bytes_);
    regions_.reserve(regions_.size() + 1);
    next_ = static_cast<char*>(map_aligned(bytes));
    regions_.emplace_back(next_, bytes);
    bytes_ += bytes;
    left_ = bytes / chunk_bytes_;
  }
  char* chunk = next_;
  next_ += chunk_bytes_;
  left_--;
  return chunk;
}

int64_t Slabs::bytes() {
  std::lock_guard<std::mutex> hold(lock_);
  return bytes_;
}

}  // namespace headwater
