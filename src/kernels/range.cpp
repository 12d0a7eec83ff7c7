#include "range.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1; before it khugepaged does the same in its own time
#endif

namespace headwater {
Range::~Range() {
  if (start_ != nullptr) munmap(start_, static_cast<size_t>(limit_));
}

void Range::reserve(int64_t bytes) {
  bytes = whole_pages(bytes);
  const size_t more = static_cast<size_t>(bytes + kHugePage);
  void* got = mmap(nullptr, more, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (got == MAP_FAILED) throw std::bad_alloc();
  char* begin = static_cast<char*>(got);
  start_ = begin + (kHugePage - reinterpret_cast<intptr_t>(begin) % kHugePage) % kHugePage;
  limit_ = bytes;
  if (start_ > begin) munmap(begin, static_cast<size_t>(start_ - begin));
  munmap(start_ + bytes, static_cast<size_t>(begin + more - (start_ + bytes)));
}

void Range::grow(int64_t bytes) {
  bytes = whole_pages(bytes);
  if (bytes <= bytes_) return;
  if (bytes > limit_ || mprotect(start_ + bytes_, static_cast<size_t>(bytes - bytes_), PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
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
  mprotect(start_ + bytes, static_cast<size_t>(bytes_ - bytes), PROT_NONE);
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
