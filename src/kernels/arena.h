// One contiguous address range made of several memory files, or of anonymous memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace headwater {

class Arena {
 public:
  // Maps sizes[i] bytes of fds[i] one after another; no fds: sum(sizes) bytes of anonymous memory. The fds stay the caller's.
  // Throws std::invalid_argument or std::system_error and leaves nothing mapped.
  Arena(const std::vector<int>& fds, const std::vector<int64_t>& sizes, bool is_private);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  uint8_t* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

  // Maps other files at the same addresses: as many, as many bytes together. What was written to a private mapping is dropped.
  // Throws std::invalid_argument or std::system_error: then the old files still show; or, when the system has no memory left for
  // the mapping itself, the first of the new ones and the last of the old ones.
  void remap(const std::vector<int>& fds, const std::vector<int64_t>& sizes);

  // Drops what this process has written to a private mapping, so that the shared content shows again. Returns whether there
  // was anything; costs nothing when there was not.
  bool discard_private();

 private:
  void map_files(uint8_t* at, const std::vector<int>& fds, const std::vector<int64_t>& sizes, int access) const;

  uint8_t* data_ = nullptr;
  int64_t bytes_ = 0;
  size_t files_ = 0;  // 0: anonymous memory
  bool can_discard_ = false;  // a private mapping of files
  int guard_ = -1;
};

}  // namespace headwater
