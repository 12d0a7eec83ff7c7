#include "disk.h"

#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <new>
#include <system_error>

namespace headwater {
namespace {

constexpr int64_t kGrowth = 4 << 20;  // bytes that the file grows by

[[noreturn]] void fail(const std::string& what, int error = errno) { throw std::system_error(error, std::generic_category(), what); }

int make_file(const std::string& folder) {
  int fd = open(folder.c_str(), O_TMPFILE | O_RDWR | O_DIRECT | O_CLOEXEC, 0600);
  if (fd >= 0) return fd;
  // Some file systems know no unnamed files, some no O_DIRECT.
  std::string path = folder + "/headwater-XXXXXX";
  fd = mkostemp(path.data(), O_CLOEXEC | O_DIRECT);
  if (fd < 0 && errno == EINVAL) fd = mkostemp(path.data(), O_CLOEXEC);
  if (fd < 0) fail("Cannot make a file to spill to in " + folder);
  unlink(path.c_str());
  return fd;
}

}  // namespace

Disk::Disk(const std::string& folder, int64_t unit_bytes) : unit_bytes_(unit_bytes) {
  fd_ = make_file(folder);
  buffers_ = static_cast<char*>(std::aligned_alloc(4096, static_cast<size_t>(memory_bytes())));
  if (buffers_ != nullptr) return;
  close(fd_);
  throw std::bad_alloc();
}

Disk::~Disk() {
  {
    std::lock_guard<std::mutex> hold(lock_);
    is_closing_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  std::free(buffers_);
  close(fd_);
}

uint32_t Disk::take() {
  std::lock_guard<std::mutex> hold(space_);
  if (!free_.empty()) {
    const uint32_t unit = free_.back();
    free_.pop_back();
    return unit;
  }
  if (used_ == allocated_) {
    // Room is made certain now, so that no write meets a full disk; when there is not so much of it, for one unit.
    uint32_t more = static_cast<uint32_t>(std::max<int64_t>(1, kGrowth / unit_bytes_));
    const auto grow = [this](uint32_t units) { return posix_fallocate(fd_, allocated_ * unit_bytes_, units * unit_bytes_); };
    int error = grow(more);
    if (error == ENOSPC) error = grow(more = 1);
    if (error != 0) fail("Cannot make room on the disk for rows", error);
    allocated_ += more;
  }
  free_.reserve(allocated_);  // so that giving back never fails
  return used_++;
}

void Disk::give(uint32_t unit) {
  std::lock_guard<std::mutex> hold(space_);
  free_.push_back(unit);
}

int64_t Disk::bytes() {
  std::lock_guard<std::mutex> hold(space_);
  return static_cast<int64_t>(allocated_) * unit_bytes_;
}

void Disk::read(uint32_t unit, char* buffer) const {
  ssize_t got;
  while ((got = pread(fd_, buffer, static_cast<size_t>(unit_bytes_), unit * unit_bytes_)) < 0 && errno == EINTR) {}
  if (got < 0) fail("Cannot read spilled rows");
  if (got != unit_bytes_) fail("Cannot read spilled rows whole", EIO);
}

void Disk::write(uint32_t unit, const char* buffer) const {
  ssize_t put;
  while ((put = pwrite(fd_, buffer, static_cast<size_t>(unit_bytes_), unit * unit_bytes_)) < 0 && errno == EINTR) {}
  if (put < 0) fail("Cannot spill rows");
  if (put != unit_bytes_) fail("Cannot spill rows whole", ENOSPC);
}

void Disk::run(int64_t count, const Task& task) {
  if (count == 0) return;
  Job job{task, count, 0, 0, nullptr};
  std::unique_lock<std::mutex> hold(lock_);
  sigset_t all, old;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &old);  // signals are for the program's own threads
  while (static_cast<int64_t>(threads_.size()) < std::min<int64_t>(kDepth, count)) {
    char* buffer = buffers_ + static_cast<int64_t>(threads_.size()) * unit_bytes_;
    threads_.emplace_back([this, buffer] { serve(buffer); });
  }
  pthread_sigmask(SIG_SETMASK, &old, nullptr);
  jobs_.push_back(&job);
  wake_.notify_all();
  done_.wait(hold, [&] { return job.ended == job.count; });
  if (job.failure) std::rethrow_exception(job.failure);
}

void Disk::serve(char* buffer) {
  std::unique_lock<std::mutex> hold(lock_);
  for (;;) {
    wake_.wait(hold, [this] { return is_closing_ || !jobs_.empty(); });
    if (is_closing_) return;
    Job* job = jobs_.front();
    const int64_t index = job->next++;
    if (job->next == job->count) jobs_.pop_front();
    const bool is_lost = job->failure != nullptr;  // nothing more comes of this job
    hold.unlock();
    std::exception_ptr failure;
    try {
      if (!is_lost) job->task(index, buffer);
    } catch (...) {
      failure = std::current_exception();
    }
    hold.lock();
    if (failure && !job->failure) job->failure = failure;
    if (++job->ended == job->count) done_.notify_all();
  }
}

}  // namespace headwater
