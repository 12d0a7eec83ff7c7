#include "range.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <new>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1; before it khugepaged does the same in its own time
#endif

namespace headwater {
namespace {

// As memory, whether or not anything lies there.
bool every_address_counts() {
  static const bool counts = [] {
    char mode = '0';
    std::ifstream("/proc/sys/vm/overcommit_memory") >> mode;
    return mode == '2';
  }();
  return counts;
}

}  // namespace

Addresses::Addresses(int64_t bytes) : bytes_(bytes) {
  const size_t more = static_cast<size_t>(bytes + Range::kHugePage);
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  are_open_ = !every_address_counts();
  void* got = mmap(nullptr, more, are_open_ ? PROT_READ | PROT_WRITE : PROT_NONE, kFlags, -1, 0);
  if (got == MAP_FAILED) throw std::bad_alloc();
  char* begin = static_cast<char*>(got);
  start_ = begin + (Range::kHugePage - reinterpret_cast<intptr_t>(begin) % Range::kHugePage) % Range::kHugePage;
  if (start_ > begin) munmap(begin, static_cast<size_t>(start_ - begin));
  munmap(start_ + bytes, static_cast<size_t>(begin + more - (start_ + bytes)));
  madvise(start_, static_cast<size_t>(bytes), MADV_NOHUGEPAGE);  // or each stripe might begin with one
}

void Addresses::open(int64_t from, int64_t bytes) const {
  if (are_open_ || bytes == 0) return;
  if (mprotect(start_ + from, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
}

Addresses::~Addresses() { munmap(start_, static_cast<size_t>(bytes_)); }

void Range::move(char* start, int64_t limit, bool is_open) {
  if (bytes_ > 0) {
    huge_ = bytes_ / kHugePage * kHugePage;
    madvise(start, static_cast<size_t>(huge_), MADV_HUGEPAGE);
    std::memcpy(start, start_, static_cast<size_t>(bytes_));
    madvise(start_, static_cast<size_t>(bytes_), MADV_DONTNEED);
  }
  start_ = start, limit_ = limit, is_open_ = is_open;
}

void Range::grow(int64_t bytes) {
  bytes = whole_pages(bytes);
  if (bytes <= bytes_) return;
  if (bytes > limit_) throw std::bad_alloc();
  if (!is_open_ && mprotect(start_ + bytes_, static_cast<size_t>(bytes - bytes_), PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  const int64_t whole = bytes / kHugePage * kHugePage;
  if (huge_ < whole) madvise(start_ + huge_, static_cast<size_t>(whole - huge_), MADV_HUGEPAGE);
  // Those that were in use in part, in small pages, become one now that they are full.
  for (; huge_ + kHugePage <= bytes_; huge_ += kHugePage) madvise(start_ + huge_, kHugePage, MADV_COLLAPSE);
  bytes_ = bytes;
}

void Range::shrink(int64_t bytes) {
  bytes = whole_pages(bytes);
  if (bytes >= bytes_) return;
  madvise(start_ + bytes, static_cast<size_t>(bytes_ - bytes), MADV_DONTNEED);
  madvise(start_ + bytes, static_cast<size_t>(bytes_ - bytes), MADV_NOHUGEPAGE);
  if (!is_open_) mprotect(start_ + bytes, static_cast<size_t>(bytes_ - bytes), PROT_NONE);
  bytes_ = bytes;
  huge_ = std::min(huge_, bytes / kHugePage * kHugePage);
}

void* take_zeroed(int64_t bytes) {
  constexpr int64_t kHugePage = Range::kHugePage;
  const size_t size = static_cast<size_t>(bytes);
  void* got = std::aligned_alloc(bytes < kHugePage ? 64 : kHugePage, size);
  if (got == nullptr) return nullptr;
  if (bytes >= kHugePage) madvise(got, size / kHugePage * kHugePage, MADV_HUGEPAGE);
  return std::memset(got, 0, size);
}

}  // namespace headwater
