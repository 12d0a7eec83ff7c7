// A thread that says "alive" whatever the interpreter is doing.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <string>
#include <thread>

namespace headwater {

class Heartbeat {
 public:
  // Writes `frame` to a duplicate of `fd`, now and then every interval, until stopped or until writing fails.
  // A frame is written whole; a beat that falls due while the one before is still on its way is left out.
  // Throws std::invalid_argument or std::system_error.
  Heartbeat(int fd, std::string frame, double interval_s);
  ~Heartbeat() { stop(); }
  Heartbeat(const Heartbeat&) = delete;
  Heartbeat& operator=(const Heartbeat&) = delete;

  void stop();  // wakes the thread and waits for its end; twice is fine
  bool alive() const;

 private:
  void beat();

  const pid_t owner_;
  const std::string frame_;
  const double interval_s_;
  int fd_ = -1, stop_fd_ = -1;
  std::atomic<bool> running_{false}, stopped_{false};
  std::thread thread_;
};

}  // namespace headwater
