#include "arena.h"

#include <errno.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <mutex>
#include <stdexcept>
#include <system_error>

namespace headwater {
namespace {

[[noreturn]] void fail(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

// A private mapping is read-only until somebody writes to it: the first write faults, and the handler below makes the whole
// arena writable and takes a note. So a pull that finds no note costs nothing; scanning the page tables for written pages would
// cost 40 ns a page at every pull.
struct Guard {
  std::atomic<uint8_t*> data{nullptr};
  std::atomic<int64_t> bytes{0};
  std::atomic<bool> is_written{false};
};
constexpr int kGuards = 256;
Guard guards[kGuards];
struct sigaction previous_action;

void on_fault(int signal, siginfo_t* info, void* context) {
  const int error = errno;
  const auto* at = static_cast<const uint8_t*>(info->si_addr);
  if (info->si_code == SEGV_ACCERR) {
    for (Guard& guard : guards) {
      uint8_t* data = guard.data.load();
      if (data == nullptr || at < data || at >= data + guard.bytes.load()) continue;
      if (mprotect(data, static_cast<size_t>(guard.bytes.load()), PROT_READ | PROT_WRITE) == 0) {
        guard.is_written.store(true);  // not before: whoever clears the note then guards anew, and the write comes back here
        errno = error;
        return;
      }
    }
  }
  // Not ours: whoever was there before, such as Python's faulthandler; or the default, to which the repeated fault goes.
  if (previous_action.sa_flags & SA_SIGINFO) {
    previous_action.sa_sigaction(signal, info, context);
  } else if (previous_action.sa_handler == SIG_DFL || previous_action.sa_handler == SIG_IGN) {
    sigaction(signal, &previous_action, nullptr);
  } else {
    previous_action.sa_handler(signal);
  }
}

void install_handler() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    if (sigaction(SIGSEGV, &action, &previous_action) != 0) fail("sigaction");
  });
}

// Returns the arena's guard, or -1 when there are too many arenas: then it is always taken for written.
int take_guard(uint8_t* data, int64_t bytes) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  for (int i = 0; i < kGuards; i++) {
    if (guards[i].data.load() != nullptr) continue;
    guards[i].bytes.store(bytes);
    guards[i].is_written.store(false);
    guards[i].data.store(data);
    return i;
  }
  return -1;
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
    : files_(fds.size()), can_discard_(is_private && !fds.empty()) {
  check(fds, sizes);
  for (const int64_t size : sizes) bytes_ += size;
  const bool anonymous = fds.empty();
  void* base = mmap(nullptr, static_cast<size_t>(bytes_), anonymous ? PROT_READ | PROT_WRITE : PROT_NONE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) fail("mmap");
  data_ = static_cast<uint8_t*>(base);
  if (anonymous) madvise(base, static_cast<size_t>(bytes_), MADV_HUGEPAGE);  // fewer page faults and misses, where the system has them
  try {
    map_files(data_, fds, sizes, PROT_READ | PROT_WRITE);
  } catch (...) {
    munmap(data_, static_cast<size_t>(bytes_));
    throw;
  }
  if (!can_discard_) return;
  install_handler();
  guard_ = take_guard(data_, bytes_);
  if (guard_ >= 0 && mprotect(data_, static_cast<size_t>(bytes_), PROT_READ) != 0) fail("mprotect");
}

Arena::~Arena() {
  if (guard_ >= 0) guards[guard_].data.store(nullptr);
  munmap(data_, static_cast<size_t>(bytes_));
}

void Arena::map_files(uint8_t* at, const std::vector<int>& fds, const std::vector<int64_t>& sizes, int access) const {
  for (size_t i = 0; i < fds.size(); i++) {
    if (mmap(at, static_cast<size_t>(sizes[i]), access, MAP_FIXED | (can_discard_ ? MAP_PRIVATE : MAP_SHARED), fds[i], 0) == MAP_FAILED) fail("mmap");
    at += sizes[i];
  }
}

void Arena::remap(const std::vector<int>& fds, const std::vector<int64_t>& sizes) {
  check(fds, sizes);
  int64_t total = 0;
  for (const int64_t size : sizes) total += size;
  if (files_ == 0 || fds.size() != files_ || total != bytes_) {
    throw std::invalid_argument("Expected " + std::to_string(files_) + " files of " + std::to_string(bytes_) + " bytes together, got " +
                                std::to_string(fds.size()) + " of " + std::to_string(total) + ".");
  }
  const size_t bytes = static_cast<size_t>(bytes_);
  const int access = guard_ >= 0 ? PROT_READ : PROT_READ | PROT_WRITE;
  // Elsewhere first: what cannot be mapped is found out while nothing is lost.
  void* trial = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (trial == MAP_FAILED) fail("mmap");
  try {
    map_files(static_cast<uint8_t*>(trial), fds, sizes, PROT_READ | PROT_WRITE);
  } catch (...) {
    munmap(trial, bytes);
    throw;
  }
  munmap(trial, bytes);
  if (guard_ >= 0) guards[guard_].is_written.store(false);
  try {
    map_files(data_, fds, sizes, access);
  } catch (...) {
    if (guard_ >= 0) guards[guard_].is_written.store(true);  // some may still be what was written before
    throw;
  }
}

bool Arena::discard_private() {
  if (!can_discard_ || (guard_ >= 0 && !guards[guard_].is_written.exchange(false))) return false;
  if (madvise(data_, static_cast<size_t>(bytes_), MADV_DONTNEED) != 0) fail("madvise");
  if (guard_ >= 0 && mprotect(data_, static_cast<size_t>(bytes_), PROT_READ) != 0) fail("mprotect");
  return true;
}

}  // namespace headwater
