// Checked arguments: whoever takes something from Python takes it through here.
#pragma once

#include <Python.h>
#include <nanobind/nanobind.h>

#include <cstring>
#include <string>

#include "levels.h"
#include "pool.h"

namespace headwater {

[[noreturn]] inline void refuse(const std::string& text) { throw nanobind::value_error(text.c_str()); }

// A contiguous buffer, held for as long as this object lives.
class Buffer {
 public:
  // formats: the element formats it may have besides plain bytes, as in the struct module.
  Buffer(nanobind::handle object, const char* formats, int64_t item, bool writable, const std::string& what) {
    const int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) {
      PyErr_Clear();
      refuse("Expected a contiguous " + std::string(writable ? "writable " : "") + "buffer — " + what + ".");
    }
    const std::string problem = check(formats, item);
    if (!problem.empty()) {
      PyBuffer_Release(&view_);
      refuse(problem + " — " + what + ".");
    }
  }
  ~Buffer() {
    if (view_.obj != nullptr) PyBuffer_Release(&view_);
  }
  Buffer(Buffer&& other) noexcept : view_(other.view_) { other.view_.obj = nullptr; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  char* data() const { return static_cast<char*>(view_.buf); }
  int64_t bytes() const { return view_.len; }
  int dimensions() const { return view_.ndim; }
  int64_t side(int i) const { return view_.shape == nullptr ? view_.len / view_.itemsize : view_.shape[i]; }

 private:
  std::string check(const char* formats, int64_t item) const {
    const char* format = view_.format == nullptr ? "B" : view_.format;
    if (*format == '@' || *format == '=' || *format == '<') format++;
    const bool plain = std::strcmp(format, "B") == 0 || std::strcmp(format, "b") == 0 || std::strcmp(format, "c") == 0;
    const bool typed = format[0] != 0 && format[1] == 0 && std::strchr(formats, format[0]) != nullptr && view_.itemsize == item;
    if (!typed && !plain) {
      return std::string("Expected elements of format '") + formats + "' or bytes, got '" + format + "'";
    }
    if (view_.len % item != 0) {
      return "Expected a multiple of " + std::to_string(item) + " bytes, got " + std::to_string(view_.len);
    }
    if (reinterpret_cast<uintptr_t>(view_.buf) % static_cast<uintptr_t>(item) != 0) {
      return "Expected an address that is a multiple of " + std::to_string(item);
    }
    return "";
  }

  Py_buffer view_ = {};
};

inline const Level& level_of(const std::string& name) {
  const Level* level = find_level(name);
  if (level == nullptr) refuse("Expected a level of simd_levels() or auto, got " + name + ".");
  return *level;
}

inline int threads_of(int threads) {
  if (threads < 1 || threads > kThreadsMax) {
    refuse("Expected 1 to " + std::to_string(kThreadsMax) + " threads, got " + std::to_string(threads) + ".");
  }
  return threads;
}

}  // namespace headwater
