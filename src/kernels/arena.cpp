#include "arena.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <system_error>

namespace headwater {
namespace {

[[noreturn]] void fail(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

// PAGEMAP_SCAN, Linux 6.7 (include/uapi/linux/fs.h); written out because older headers lack it.
struct PageRegion {
  uint64_t start, end, categories;
};
struct ScanArguments {
  uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
  uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define HEADWATER_PAGEMAP_SCAN _IOWR('f', 16, ScanArguments)
constexpr uint64_t kIsFile = 1 << 2, kIsPresent = 1 << 3, kIsSwapped = 1 << 4;

void drop(uint64_t start, uint64_t end) {
  if (madvise(reinterpret_cast<void*>(start), end - start, MADV_DONTNEED) != 0) fail("madvise");
}

// Returns the bytes dropped, or -1 when this kernel has no PAGEMAP_SCAN.
int64_t discard_by_scan(int pagemap, uint64_t start, uint64_t end) {
  constexpr int kRegions = 512;
  std::vector<PageRegion> regions(kRegions);
  int64_t dropped = 0;
  while (start < end) {
    ScanArguments scan = {};
    scan.size = sizeof scan;
    scan.start = start;
    scan.end = end;
    scan.vec = reinterpret_cast<uint64_t>(regions.data());
    scan.vec_len = kRegions;
    scan.category_inverted = kIsFile;  // wanted: not a page of the file, …
    scan.category_mask = kIsFile;
    scan.category_anyof_mask = kIsPresent | kIsSwapped;  // … and there
    scan.return_mask = kIsPresent;
    const int count = ioctl(pagemap, HEADWATER_PAGEMAP_SCAN, &scan);
    if (count < 0) {
      if (errno == EINTR) continue;
      return -1;
    }
    for (int i = 0; i < count; i++) {
      drop(regions[i].start, regions[i].end);
      dropped += static_cast<int64_t>(regions[i].end - regions[i].start);
    }
    if (scan.walk_end <= start) return -1;
    start = scan.walk_end;
  }
  return dropped;
}

// The older way: one 8-byte entry per page; bit 63 present, bit 62 swapped, bit 61 a page of a file.
int64_t discard_by_pagemap(int pagemap, uint64_t start, uint64_t end, uint64_t page) {
  std::vector<uint64_t> entries(8192);
  int64_t dropped = 0;
  while (start < end) {
    const uint64_t wanted = std::min<uint64_t>(entries.size(), (end - start) / page);
    const ssize_t got = pread(pagemap, entries.data(), wanted * 8, static_cast<off_t>(start / page * 8));
    if (got < 8) {
      if (got < 0 && errno == EINTR) continue;
      fail("/proc/self/pagemap");
    }
    const uint64_t count = static_cast<uint64_t>(got) / 8;
    for (uint64_t i = 0; i < count; i++) {
      const bool is_private = (entries[i] >> 62) != 0 && !((entries[i] >> 61) & 1);
      if (!is_private) continue;
      drop(start + i * page, start + (i + 1) * page);
      dropped += static_cast<int64_t>(page);
    }
    start += count * page;
  }
  return dropped;
}

void check(const std::vector<int>& fds, const std::vector<int64_t>& sizes) {
  const int64_t page = sysconf(_SC_PAGESIZE);
  if (sizes.empty()) throw std::invalid_argument("Expected at least one size, got none.");
  if (!fds.empty() && fds.size() != sizes.size()) {
    throw std::invalid_argument("Expected a size per file, got " + std::to_string(fds.size()) + " files and " +
                                std::to_string(sizes.size()) + " sizes.");
  }
  int64_t total = 0;
  for (size_t i = 0; i < sizes.size(); i++) {
    if (sizes[i] <= 0 || sizes[i] % page != 0 || __builtin_add_overflow(total, sizes[i], &total)) {
      throw std::invalid_argument("Expected sizes that are positive multiples of " + std::to_string(page) +
                                  " bytes, got " + std::to_string(sizes[i]) + ".");
    }
    if (fds.empty()) continue;
    struct stat status;
    if (fstat(fds[i], &status) != 0) fail("fstat");
    if (status.st_size < sizes[i]) {  // touching what a file lacks would kill the process
      throw std::invalid_argument("Expected a file of at least " + std::to_string(sizes[i]) + " bytes, got " +
                                  std::to_string(status.st_size) + ".");
    }
  }
}

}  // namespace

Arena::Arena(const std::vector<int>& fds, const std::vector<int64_t>& sizes, bool is_private)
    : can_discard_(is_private && !fds.empty()) {
  check(fds, sizes);
  for (const int64_t size : sizes) bytes_ += size;
  const bool anonymous = fds.empty();
  void* base = mmap(nullptr, static_cast<size_t>(bytes_), anonymous ? PROT_READ | PROT_WRITE : PROT_NONE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) fail("mmap");
  data_ = static_cast<uint8_t*>(base);
  uint8_t* at = data_;
  for (size_t i = 0; i < fds.size(); i++) {
    if (mmap(at, static_cast<size_t>(sizes[i]), PROT_READ | PROT_WRITE, MAP_FIXED | (is_private ? MAP_PRIVATE : MAP_SHARED),
             fds[i], 0) == MAP_FAILED) {
      const int error = errno;
      munmap(data_, static_cast<size_t>(bytes_));
      errno = error;
      fail("mmap");
    }
    at += sizes[i];
  }
}

Arena::~Arena() { munmap(data_, static_cast<size_t>(bytes_)); }

int64_t Arena::discard_private() {
  if (!can_discard_) return 0;
  const int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (pagemap < 0) fail("/proc/self/pagemap");
  const auto start = reinterpret_cast<uint64_t>(data_), end = start + static_cast<uint64_t>(bytes_);
  int64_t dropped = -1;
  try {
    dropped = discard_by_scan(pagemap, start, end);
    if (dropped < 0) {
      dropped = discard_by_pagemap(pagemap, start, end, static_cast<uint64_t>(sysconf(_SC_PAGESIZE)));
    }
  } catch (...) {
    close(pagemap);
    throw;
  }
  close(pagemap);
  return dropped;
}

}  // namespace headwater
