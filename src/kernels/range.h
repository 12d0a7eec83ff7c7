// Memory for rows: addresses that lie one after the other, of which pages come into use from the front.
#pragma once

#include <cstdint>

namespace headwater {

// Addresses and no memory, for all stripes of a table. One mapping, for a process has only some ten thousand.
class Addresses {
 public:
  explicit Addresses(int64_t bytes);  // on the boundary of a huge page; throws std::bad_alloc
  ~Addresses();
  Addresses(const Addresses&) = delete;
  Addresses& operator=(const Addresses&) = delete;

  char* start() const { return start_; }
  // Whether they may be written to at once; where the system counts every address as memory (vm.overcommit_memory = 2), not before
  // they are in use.
  bool are_open() const { return are_open_; }
  void open(int64_t from, int64_t bytes) const;  // throws std::bad_alloc

 private:
  char* start_ = nullptr;
  int64_t bytes_ = 0;
  bool are_open_ = true;
};

// A stripe's part of them.
class Range {
 public:
  // What is in use is copied to `start`, where it may be written to, and lies there from now on.
  void move(char* start, int64_t limit, bool is_open);
  int64_t limit() const { return limit_; }
  int64_t bytes() const { return bytes_; }  // in use, or about to be
  // So much is in use, in whole pages; what is new is zero. Pages become huge ones when all of such a page is in use and written to,
  // where the system has them. Throws std::bad_alloc, and nothing has changed.
  void grow(int64_t bytes);
  void shrink(int64_t bytes);  // what is past it goes back to the system

  static constexpr int64_t kPage = 4096, kHugePage = 2 << 20;
  static int64_t whole_pages(int64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

 private:
  char* start_ = nullptr;
  int64_t limit_ = 0, bytes_ = 0;
  int64_t huge_ = 0;  // so much was asked to lie in huge pages
  bool is_open_ = true;
};

// Zeroed memory on the boundary of a line, in huge pages as far as they fill and the system has them; for std::free. Null: there is none.
void* take_zeroed(int64_t bytes);

}  // namespace headwater
