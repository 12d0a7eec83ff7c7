#include "heartbeat.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <system_error>

namespace headwater {
namespace {

double now_s() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

}  // namespace

Heartbeat::Heartbeat(int fd, std::string frame, double interval_s)
    : owner_(getpid()), frame_(std::move(frame)), interval_s_(interval_s) {
  if (frame_.empty()) throw std::invalid_argument("Expected a frame of at least one byte, got none.");
  if (!(interval_s >= 1e-3 && interval_s <= 86400.0)) {
    throw std::invalid_argument("Expected an interval from 0.001 to 86400 seconds, got " + std::to_string(interval_s) + ".");
  }
  fd_ = fcntl(fd, F_DUPFD_CLOEXEC, 0);
  if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "dup");
  stop_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  sigset_t all, old;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &old);
  try {
    if (stop_fd_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
    running_ = true;
    thread_ = std::thread([this] { beat(); });
  } catch (...) {
    running_ = false;
    pthread_sigmask(SIG_SETMASK, &old, nullptr);
    close(fd_);
    if (stop_fd_ >= 0) close(stop_fd_);
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &old, nullptr);
}

bool Heartbeat::alive() const { return running_ && !stopped_ && owner_ == getpid(); }

void Heartbeat::beat() {
  size_t sent = 0;  // of the frame that is under way
  double due_s = now_s();
  for (;;) {
    const double left_s = due_s - now_s();
    const bool writing = sent > 0 || left_s <= 0;
    if (writing) {
      const ssize_t n = send(fd_, frame_.data() + sent, frame_.size() - sent, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n < 0 && errno != EAGAIN && errno != EINTR) break;
      if (n > 0) sent += static_cast<size_t>(n);
      if (sent == frame_.size()) {
        sent = 0;
        due_s = std::max(due_s + interval_s_, now_s());
        continue;
      }
    }
    pollfd waits[2] = {{stop_fd_, POLLIN, 0}, {fd_, POLLOUT, 0}};
    const int timeout_ms = writing ? -1 : static_cast<int>(left_s * 1000.0) + 1;
    if (poll(waits, writing ? 2 : 1, timeout_ms) < 0 && errno != EINTR) break;
    if (waits[0].revents != 0) break;
  }
  running_ = false;
}

void Heartbeat::stop() {
  if (stopped_.exchange(true)) return;
  if (owner_ == getpid()) {
    const uint64_t one = 1;
    if (write(stop_fd_, &one, sizeof one) < 0) {
      // The counter can only be full when it is already set.
    }
    thread_.join();
  } else {
    thread_.detach();  // a forked child has no such thread
  }
  close(fd_);
  close(stop_fd_);
}

}  // namespace headwater
