// Threads that live as long as the process and hand themselves numbered tasks.
#pragma once

#include <cstdint>
#include <functional>

namespace headwater {

// Calls task(0) … task(count − 1), each once, in any order, on at most `threads` threads, this one among them.
// A task that returns false ends the hand-out early. Returns when every begun task has returned.
// When the pool is at work for another caller, this thread does everything alone: it never waits for its turn.
void run_tasks(int64_t count, int threads, const std::function<bool(int64_t)>& task);

constexpr int kThreadsMax = 256;

}  // namespace headwater
