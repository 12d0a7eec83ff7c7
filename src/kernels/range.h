// Memory for one stripe's rows: addresses of their own, one after the other, of which pages come into use from the front.
#pragma once

#include <cstdint>

namespace headwater {

class Range {
 public:
  Range() = default;
  ~Range();
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;

  void reserve(int64_t bytes);  // addresses and no memory; once. Throws std::bad_alloc
  char* start() const { return start_; }
  int64_t limit() const { return limit_; }  // what was reserved
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
};

// Zeroed memory on the boundary of a line, in huge pages as far as they fill and the system has them; for std::free. Null: there is none.
void* take_zeroed(int64_t bytes);

}  // namespace headwater
