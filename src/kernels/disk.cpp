#include "disk.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <exception>
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
  if (syscall(SYS_io_setup, kDepth, &context_) != 0) fail("Cannot read and write many units at once (see fs.aio-max-nr)");
  try {
    fd_ = make_file(folder);
    buffers_ = static_cast<char*>(std::aligned_alloc(4096, static_cast<size_t>(kDepth * unit_bytes_)));
    if (buffers_ == nullptr) throw std::bad_alloc();
  } catch (...) {
    close_all();
    throw;
  }
}

Disk::~Disk() { close_all(); }

void Disk::close_all() {
  syscall(SYS_io_destroy, context_);
  std::free(buffers_);
  if (fd_ >= 0) close(fd_);
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

void Disk::check(bool is_write, int64_t moved) const {
  if (moved == unit_bytes_) return;
  if (is_write) fail(moved < 0 ? "Cannot spill rows" : "Cannot spill rows whole", moved < 0 ? static_cast<int>(-moved) : ENOSPC);
  fail(moved < 0 ? "Cannot read spilled rows" : "Cannot read spilled rows whole", moved < 0 ? static_cast<int>(-moved) : EIO);
}

void Disk::run(int64_t count, const Task& task) {
  struct Slot {
    iocb block = {};
    int64_t index = 0;
    int stage = 0;
    bool is_write = false;
  };
  if (count == 0) return;
  std::lock_guard<std::mutex> hold(turn_);
  const int depth = static_cast<int>(std::min<int64_t>(kDepth, count));
  std::vector<Slot> slots(static_cast<size_t>(depth));
  std::vector<Slot*> idle;
  std::vector<iocb*> ready;
  std::vector<io_event> events(static_cast<size_t>(depth));
  std::exception_ptr failure;  // from then on nothing is begun
  int64_t next = 0, under_way = 0;
  for (Slot& slot : slots) idle.push_back(&slot);

  const auto attempt = [&](auto work) {
    try {
      if (!failure) work();
    } catch (...) {
      failure = std::current_exception();
    }
  };
  const auto go_on = [&](Slot* slot) {
    std::optional<Step> step;
    char* buffer = buffers_ + (slot - slots.data()) * unit_bytes_;
    attempt([&] { step = task(slot->index, slot->stage++, buffer); });
    if (!step) return idle.push_back(slot);
    slot->is_write = step->is_write;
    slot->block = {};
    slot->block.aio_data = reinterpret_cast<uint64_t>(slot);
    slot->block.aio_lio_opcode = step->is_write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
    slot->block.aio_fildes = static_cast<uint32_t>(fd_);
    slot->block.aio_buf = reinterpret_cast<uint64_t>(buffer);
    slot->block.aio_nbytes = static_cast<uint64_t>(unit_bytes_);
    slot->block.aio_offset = step->unit * unit_bytes_;
    ready.push_back(&slot->block);
  };
  for (;;) {
    while (!idle.empty() && next < count && !failure) {
      Slot* slot = idle.back();
      idle.pop_back();
      slot->index = next++;
      slot->stage = 0;
      go_on(slot);
    }
    if (!ready.empty() && !failure) {
      const long begun = syscall(SYS_io_submit, context_, ready.size(), ready.data());
      if (begun > 0) {
        ready.erase(ready.begin(), ready.begin() + begun);
        under_way += begun;
      } else if (errno != EINTR && (errno != EAGAIN || under_way == 0)) {  // EAGAIN: when some have ended
        attempt([&] { fail("Cannot read or spill rows"); });
      }
    }
    if (under_way == 0) {
      if (failure) std::rethrow_exception(failure);
      if (ready.empty() && next == count) return;
      continue;
    }
    const long ended = syscall(SYS_io_getevents, context_, 1, depth, events.data(), nullptr);
    for (long i = 0; i < ended; i++) {
      Slot* slot = reinterpret_cast<Slot*>(events[static_cast<size_t>(i)].data);
      under_way--;
      attempt([&] { check(slot->is_write, events[static_cast<size_t>(i)].res); });
      go_on(slot);
    }
  }
}

void Disk::read(const std::vector<uint32_t>& units, const std::function<void(int64_t, const char*)>& take) {
  run(static_cast<int64_t>(units.size()), [&](int64_t i, int stage, char* buffer) -> std::optional<Step> {
    if (stage == 0) return Step{false, units[static_cast<size_t>(i)]};
    take(i, buffer);
    return std::nullopt;
  });
}

}  // namespace headwater
