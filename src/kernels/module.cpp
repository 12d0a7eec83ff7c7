// The Python face of the kernels: every argument is checked here, the GIL is given up for the work itself.

#include <Python.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "arena.h"
#include "arguments.h"
#include "heartbeat.h"
#include "levels.h"
#include "passes.h"
#include "pool.h"
#include "table_module.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace headwater {
namespace {

constexpr int64_t kAlone = 1 << 16;             // elements: less than this is not worth waking a thread
constexpr int64_t kStreamedBytes = 16ll << 20;  // more than this will not stay in the cache anyway

struct WireName {
  const char* name;
  Wire wire;
  const char* formats;
  int64_t item;         // bytes
  const char* master_formats;
  int64_t master_item;  // bytes
};
constexpr WireName kWires[] = {
    {"float32", Wire::float32, "f", 4, "f", 4},
    {"float64", Wire::float64, "d", 8, "d", 8},
    {"bfloat16", Wire::bfloat16, "HhEe", 2, "f", 4},
    {"float16", Wire::float16, "eHh", 2, "f", 4},
};

const WireName& wire_of(const std::string& name) {
  for (const WireName& wire : kWires) {
    if (name == wire.name) return wire;
  }
  refuse("Expected the dtype float32, float64, bfloat16 or float16, got " + name + ".");
}

struct OptimizerName {
  const char* name;
  Optimizer optimizer;
  int flags;        // all it knows
  int64_t scalars;  // per row
};
constexpr OptimizerName kOptimizers[] = {
    {"sgd", Optimizer::sgd, kMomentum | kNesterov, 4},
    {"adagrad", Optimizer::adagrad, 0, 3},
    {"rmsprop", Optimizer::rmsprop, kMomentum | kCentered, 8},
    {"adam", Optimizer::adam, kAmsgrad, 7},
    {"adamw", Optimizer::adamw, kAmsgrad, 7},
    {"mean", Optimizer::mean, 0, 0},
};

const OptimizerName& optimizer_of(const std::string& name, int flags) {
  for (const OptimizerName& optimizer : kOptimizers) {
    if (name != optimizer.name) continue;
    const bool alone = optimizer.optimizer == Optimizer::sgd && flags == kNesterov;  // no momentum to look ahead with
    if ((flags & ~optimizer.flags) != 0 || alone) refuse("Unknown flags " + std::to_string(flags) + " — optimizer " + name + ".");
    return optimizer;
  }
  refuse("Expected sgd, adagrad, rmsprop, adam, adamw or mean, got " + name + ".");
}

int slots_of(Optimizer optimizer, int flags) {
  switch (optimizer) {
    case Optimizer::sgd: return flags & kMomentum ? 1 : 0;
    case Optimizer::adagrad: return 1;
    case Optimizer::rmsprop: return 1 + (flags & kMomentum ? 1 : 0) + (flags & kCentered ? 1 : 0);
    case Optimizer::adam:
    case Optimizer::adamw: return 2 + (flags & kAmsgrad ? 1 : 0);
    case Optimizer::mean: return 0;
  }
  return 0;
}

void check_finite(const double* values, int64_t count, const std::string& what) {
  for (int64_t i = 0; i < count; i++) {
    if (!std::isfinite(values[i])) refuse("Expected finite " + what + ", got " + std::to_string(values[i]) + ".");
  }
}

// Runs, scalars, contributions and coefficients of one commit, checked, with the buffers behind them.
class CommitBuffers {
 public:
  // elements < 0: whatever the runs cover. width < 0: there are no scalars and any row will do.
  CommitBuffers(nb::handle runs, nb::handle scalars, nb::handle contributions, nb::handle coefficients,
                const WireName& wire, int64_t elements, int64_t width)
      : runs_(runs, "lq", 8, false, "runs, int64 (k, 3)"), coefficients_(coefficients, "d", 8, false, "coefficients, float64 (k, contributions)") {
    shape(runs_, -1, 3, "runs");
    commit_.runs = reinterpret_cast<const Run*>(runs_.data());
    commit_.run_count = runs_.side(0);
    int64_t rows = INT64_MAX;
    if (width >= 0) {
      scalars_ = std::make_unique<Buffer>(scalars, "d", 8, false, "scalars, float64 (rows, width)");
      shape(*scalars_, -1, width, "scalars");
      rows = scalars_->side(0);
      commit_.scalars = reinterpret_cast<const double*>(scalars_->data());
      commit_.width = width;
      check_finite(commit_.scalars, rows * width, "scalars");
    }
    elements_ = check_runs(elements, rows);

    for (nb::handle item : sequence(contributions, "contributions")) {
      gradients_.emplace_back(item, wire.formats, wire.item, false, "contribution " + std::to_string(gradients_.size()));
      const Buffer& gradient = gradients_.back();
      if (gradient.bytes() != elements_ * wire.item) {
        refuse("Expected " + std::to_string(elements_) + " elements, got " + std::to_string(gradient.bytes() / wire.item) +
               " — contribution " + std::to_string(gradients_.size() - 1) + ".");
      }
      pointers_.push_back(gradient.data());
    }
    commit_.contribution_count = static_cast<int64_t>(pointers_.size());
    shape(coefficients_, commit_.run_count, commit_.contribution_count, "coefficients");
    commit_.coefficients = reinterpret_cast<const double*>(coefficients_.data());
    check_finite(commit_.coefficients, commit_.run_count * commit_.contribution_count, "coefficients");
    commit_.contributions = pointers_.data();  // a vector's elements stay where they are when it is moved
  }

  const Commit& commit() const { return commit_; }
  int64_t elements() const { return elements_; }
  const std::vector<Buffer>& gradients() const { return gradients_; }

  static std::vector<nb::object> sequence(nb::handle object, const char* what) {
    if (!PyList_Check(object.ptr()) && !PyTuple_Check(object.ptr())) {
      refuse(std::string("Expected a list — ") + what + ".");
    }
    std::vector<nb::object> items;
    for (nb::handle item : object) items.push_back(nb::borrow(item));
    return items;
  }

 private:
  static void shape(const Buffer& buffer, int64_t rows, int64_t columns, const char* what) {
    if (buffer.dimensions() != 2 || (rows >= 0 && buffer.side(0) != rows) || buffer.side(1) != columns ||
        buffer.bytes() != buffer.side(0) * columns * 8) {
      refuse("Expected shape (" + (rows < 0 ? std::string("any") : std::to_string(rows)) + ", " + std::to_string(columns) +
             ") of 8-byte elements — " + what + ".");
    }
  }

  int64_t check_runs(int64_t elements, int64_t rows) const {
    int64_t at = 0;
    for (int64_t i = 0; i < commit_.run_count; i++) {
      const Run& run = commit_.runs[i];
      if (run.start != at || run.stop <= run.start) {
        refuse("Expected runs that follow one another from 0, got [" + std::to_string(run.start) + ", " +
               std::to_string(run.stop) + ") after " + std::to_string(at) + " — run " + std::to_string(i) + ".");
      }
      if (run.row < -1 || run.row >= rows) {
        refuse("Expected a row from -1 to " + std::to_string(rows - 1) + ", got " + std::to_string(run.row) + " — run " +
               std::to_string(i) + ".");
      }
      at = run.stop;
    }
    if (elements >= 0 && at != elements) {
      refuse("Expected runs that cover " + std::to_string(elements) + " elements, got " + std::to_string(at) + ".");
    }
    return at;
  }

  Buffer runs_, coefficients_;
  std::unique_ptr<Buffer> scalars_;
  std::vector<Buffer> gradients_;
  std::vector<const void*> pointers_;
  Commit commit_ = {};
  int64_t elements_ = 0;
};

bool overlap(const Buffer& a, const Buffer& b) {
  return a.bytes() > 0 && b.bytes() > 0 && a.data() < b.data() + b.bytes() && b.data() < a.data() + a.bytes();
}

std::vector<Buffer> planes(nb::handle list, const WireName& wire, bool writable, const std::string& what) {
  std::vector<Buffer> found;
  const bool narrow = wire.item != wire.master_item;
  for (nb::handle item : CommitBuffers::sequence(list, what.c_str())) {
    const bool is_wire = narrow && found.empty();
    found.emplace_back(item, is_wire ? wire.formats : wire.master_formats, is_wire ? wire.item : wire.master_item, writable,
                       what + " plane " + std::to_string(found.size()));
  }
  return found;
}

// The lowest (commit, contribution, element) that is not finite, or commit −1.
struct Found {
  int64_t commit = -1, contribution = -1, element = -1;
};

Found find_first(const Pass& pass, const Level& level) {
  for (int64_t i = 0; i < pass.commit_count; i++) {
    const Commit& commit = pass.commits[i];
    for (int64_t c = 0; c < commit.contribution_count; c++) {
      for (int64_t r = 0; r < commit.run_count; r++) {
        const Run& run = commit.runs[r];
        if (run.row < 0 || commit.coefficients[r * commit.contribution_count + c] == 0.0) continue;
        const int64_t element = level.find_non_finite(pass.wire, commit.contributions[c], run.start, run.stop);
        if (element >= 0) return {i, c, element};
      }
    }
  }
  return {};
}

// ---- functions -----------------------------------------------------------------------------------------------

std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (const Level* level : levels()) names.emplace_back(level->name);
  return names;
}

nb::object apply(const std::string& optimizer_name, int flags, const std::string& wire_name, nb::handle source,
                 nb::handle target, nb::handle commits, int threads, const std::string& level_name,
                 std::optional<std::pair<int64_t, int64_t>> blocks, nb::handle sums, nb::handle aggregated, bool check) {
  const WireName& wire = wire_of(wire_name);
  const OptimizerName& optimizer = optimizer_of(optimizer_name, flags);
  const Level& level = level_of(level_name);
  threads_of(threads);

  const std::vector<Buffer> from = planes(source, wire, false, "source"), to = planes(target, wire, true, "target");
  const int narrow = wire.item != wire.master_item ? 1 : 0;
  const size_t expected = static_cast<size_t>(narrow + 1 + slots_of(optimizer.optimizer, flags));
  if (from.size() != expected || to.size() != expected) {
    refuse("Expected " + std::to_string(expected) + " planes, got " + std::to_string(from.size()) + " in source and " +
           std::to_string(to.size()) + " in target — optimizer " + optimizer_name + ", " + wire_name + ".");
  }
  const int64_t elements = to[0].bytes() / wire.item;
  const auto [first, limit] = blocks.value_or(std::pair<int64_t, int64_t>(0, (elements + kBlock - 1) / kBlock));
  if (first < 0 || limit < first || limit > (elements + kBlock - 1) / kBlock) {
    refuse("Expected blocks of " + std::to_string(elements) + " elements, got [" + std::to_string(first) + ", " +
           std::to_string(limit) + ").");
  }
  const int64_t covered = std::min(limit * kBlock, elements) - std::min(first * kBlock, elements);
  int64_t bytes = 0;  // written
  Pass pass = {};
  for (size_t i = 0; i < expected; i++) {
    const int64_t item = narrow && i == 0 ? wire.item : wire.master_item;
    if (from[i].bytes() != elements * item || to[i].bytes() != elements * item) {
      refuse("Expected planes of " + std::to_string(elements) + " elements, got " + std::to_string(from[i].bytes() / item) +
             " in source and " + std::to_string(to[i].bytes() / item) + " in target — plane " + std::to_string(i) + ".");
    }
    pass.source[i] = from[i].data();
    pass.target[i] = to[i].data();
    bytes += covered * item;
  }

  std::vector<CommitBuffers> held;
  for (nb::handle item : CommitBuffers::sequence(commits, "commits")) {
    const std::vector<nb::object> parts = CommitBuffers::sequence(item, "a commit: (runs, scalars, contributions, coefficients)");
    if (parts.size() != 4) refuse("Expected (runs, scalars, contributions, coefficients), got " + std::to_string(parts.size()) + " parts.");
    held.emplace_back(parts[0], parts[1], parts[2], parts[3], wire, elements, optimizer.scalars);
  }
  if (held.empty()) refuse("Expected at least one commit, got none.");
  for (size_t i = 0; i < expected; i++) {
    for (size_t j = 0; j < expected; j++) {
      if (overlap(to[i], from[j]) || (i != j && overlap(to[i], to[j]))) refuse("Target planes overlap other planes.");
    }
    for (const CommitBuffers& one : held) {
      for (const Buffer& gradient : one.gradients()) {
        if (overlap(to[i], gradient)) refuse("A target plane overlaps a contribution.");
      }
    }
  }

  std::vector<Commit> plain;
  for (const CommitBuffers& one : held) plain.push_back(one.commit());
  pass.wire = wire.wire;
  pass.optimizer = optimizer.optimizer;
  pass.flags = flags;
  pass.elements = elements;
  pass.plane_count = static_cast<int>(expected);
  pass.commits = plain.data();
  pass.commit_count = static_cast<int64_t>(plain.size());
  std::optional<Buffer> squares;
  if (!sums.is_none()) {
    squares.emplace(sums, "d", 8, true, "sums");
    if (plain.size() != 1 || squares->bytes() != (elements + kBlock - 1) / kBlock * 8) {
      refuse("Expected one commit and a sum for each block, got " + std::to_string(plain.size()) + " commits and " +
             std::to_string(squares->bytes() / 8) + " sums.");
    }
  }
  std::vector<Buffer> gradients;  // as they are aggregated, by commit
  if (!aggregated.is_none()) {
    for (nb::handle item : CommitBuffers::sequence(aggregated, "aggregated")) {
      gradients.emplace_back(item, wire.master_formats, wire.master_item, true, "aggregated " + std::to_string(gradients.size()));
      const Buffer& out = gradients.back();
      if (out.bytes() != elements * wire.master_item) {
        refuse("Expected room for " + std::to_string(elements) + " aggregated elements, got " + std::to_string(out.bytes() / wire.master_item) + ".");
      }
      bool is_apart = true;
      for (size_t i = 0; i < expected; i++) is_apart = is_apart && !overlap(out, from[i]) && !overlap(out, to[i]);
      for (const CommitBuffers& one : held) {
        for (const Buffer& gradient : one.gradients()) is_apart = is_apart && !overlap(out, gradient);
      }
      if (!is_apart) refuse("An aggregated gradient overlaps another buffer.");
    }
    if (gradients.size() != plain.size()) {
      refuse("Expected an aggregated gradient for each of " + std::to_string(plain.size()) + " commits, got " +
             std::to_string(gradients.size()) + ".");
    }
    bytes += covered * wire.master_item;
  }
  // Commits after the first read the target again: for them it had better be in the cache.
  pass.is_checked = check;
  pass.streamed = plain.size() == 1 && 2 * bytes > kStreamedBytes;

  Found found;
  {
    nb::gil_scoped_release released;
    std::atomic<bool> finite{true};
    run_tasks(limit - first, covered < kAlone ? 1 : threads, [&](int64_t block) {
      const int64_t at = first + block;
      // First the sums: the gradients are then in the cache for the pass itself.
      if (squares) reinterpret_cast<double*>(squares->data())[at] = level.square_sum(pass.wire, pass.commits[0], elements, at);
      for (size_t i = 0; i < gradients.size(); i++) {
        level.aggregate(pass.wire, pass.commits[i], elements, gradients[i].data(), pass.streamed, at);
      }
      if (level.apply(pass, at)) return true;
      finite = false;
      return false;
    });
    if (!finite) found = find_first(pass, level);
  }
  if (found.commit < 0) return nb::none();
  return nb::make_tuple(found.commit, found.contribution, found.element);
}

nb::object square_sums(const std::string& wire_name, nb::handle runs, nb::handle contributions, nb::handle coefficients,
                       int threads, const std::string& level_name) {
  const WireName& wire = wire_of(wire_name);
  const Level& level = level_of(level_name);
  threads_of(threads);
  const CommitBuffers held(runs, nb::handle(), contributions, coefficients, wire, -1, -1);
  const int64_t elements = held.elements(), blocks = (elements + kBlock - 1) / kBlock;
  auto sums = std::make_unique<double[]>(static_cast<size_t>(blocks));
  {
    nb::gil_scoped_release released;
    run_tasks(blocks, elements < kAlone ? 1 : threads, [&](int64_t block) {
      sums[static_cast<size_t>(block)] = level.square_sum(wire.wire, held.commit(), elements, block);
      return true;
    });
  }
  double* data = sums.get();
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<double*>(p); });
  sums.release();
  return nb::cast(nb::ndarray<nb::numpy, double, nb::ndim<1>>(data, {static_cast<size_t>(blocks)}, owner));
}

void aggregate(const std::string& wire_name, nb::handle runs, nb::handle contributions, nb::handle coefficients, nb::handle out_object,
               int threads, const std::string& level_name) {
  const WireName& wire = wire_of(wire_name);
  const Level& level = level_of(level_name);
  threads_of(threads);
  const Buffer out(out_object, wire.master_formats, wire.master_item, true, "out");
  const int64_t elements = out.bytes() / wire.master_item;
  const CommitBuffers held(runs, nb::handle(), contributions, coefficients, wire, elements, -1);
  for (const Buffer& gradient : held.gradients()) {
    if (overlap(out, gradient)) refuse("The output overlaps a contribution.");
  }
  const bool streamed = 2 * out.bytes() > kStreamedBytes;
  nb::gil_scoped_release released;
  run_tasks((elements + kBlock - 1) / kBlock, elements < kAlone ? 1 : threads, [&](int64_t block) {
    level.aggregate(wire.wire, held.commit(), elements, out.data(), streamed, block);
    return true;
  });
}

// Any element type: only the bytes matter.
class Bytes {
 public:
  Bytes(nb::handle object, bool writable, const std::string& what) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE | (writable ? PyBUF_WRITABLE : 0)) != 0) {
      PyErr_Clear();
      refuse("Expected a contiguous " + std::string(writable ? "writable " : "") + "buffer — " + what + ".");
    }
  }
  ~Bytes() { PyBuffer_Release(&view_); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  char* data() const { return static_cast<char*>(view_.buf); }
  int64_t bytes() const { return view_.len; }

 private:
  Py_buffer view_ = {};
};

void copy(nb::handle target, nb::handle source, int threads) {
  threads_of(threads);
  const Bytes to(target, true, "target"), from(source, false, "source");
  if (to.bytes() != from.bytes()) {
    refuse("Expected " + std::to_string(to.bytes()) + " bytes, got " + std::to_string(from.bytes()) + " — source.");
  }
  if (to.bytes() > 0 && to.data() < from.data() + from.bytes() && from.data() < to.data() + to.bytes()) {
    refuse("The target overlaps the source.");
  }
  const Level& level = *levels().back();
  constexpr int64_t part = 1 << 19;  // bytes
  const int64_t bytes = to.bytes();
  const bool streamed = bytes > kStreamedBytes / 2;
  nb::gil_scoped_release released;
  run_tasks((bytes + part - 1) / part, threads, [&](int64_t i) {
    const int64_t at = i * part;
    level.copy(to.data() + at, from.data() + at, std::min(part, bytes - at), streamed);
    return true;
  });
}

void convert(nb::handle target, const std::string& target_dtype, nb::handle source, const std::string& source_dtype) {
  const WireName& to = wire_of(target_dtype);
  const WireName& from = wire_of(source_dtype);
  const bool narrowing = from.wire == Wire::float32 && to.item == 2, widening = to.wire == Wire::float32 && from.item == 2;
  if (!narrowing && !widening) {
    refuse("Expected float32 on one side and bfloat16 or float16 on the other, got " + source_dtype + " to " + target_dtype + ".");
  }
  const Buffer out(target, to.formats, to.item, true, "target"), in(source, from.formats, from.item, false, "source");
  const int64_t elements = out.bytes() / to.item;
  if (in.bytes() / from.item != elements) {
    refuse("Expected " + std::to_string(elements) + " elements, got " + std::to_string(in.bytes() / from.item) + " — source.");
  }
  if (overlap(out, in)) refuse("The target overlaps the source.");
  const Level& level = *levels().back();
  nb::gil_scoped_release released;
  const PlainFloats plain;
  if (narrowing) level.narrow(to.wire, out.data(), reinterpret_cast<const float*>(in.data()), elements);
  else level.widen(from.wire, reinterpret_cast<float*>(out.data()), in.data(), elements);
}

nb::object arena_array(nb::handle self) {
  Arena& arena = nb::cast<Arena&>(self);
  return nb::cast(nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>(arena.data(), {static_cast<size_t>(arena.bytes())}, self));
}

}  // namespace
}  // namespace headwater

NB_MODULE(_kernels, m) {
  using namespace headwater;

  // At exit arrays may still keep their arenas: the system takes those back, it is no leak worth a word to users.
  nb::set_leak_warnings(false);

  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const std::system_error& error) {
      PyErr_SetObject(PyExc_OSError, nb::make_tuple(error.code().value(), error.what()).ptr());
    }
  });

  m.attr("BLOCK") = kBlock;
  m.def("simd_levels", &simd_levels);
  m.def("apply", &apply, "optimizer"_a, "flags"_a, "wire"_a, "source"_a, "target"_a, "commits"_a, nb::kw_only(),
        "threads"_a, "level"_a, "blocks"_a = nb::none(), "sums"_a = nb::none(), "aggregated"_a = nb::none(), "check"_a = true);
  m.def("square_sums", &square_sums, "wire"_a, "runs"_a, "contributions"_a, "coefficients"_a, nb::kw_only(),
        "threads"_a, "level"_a);
  m.def("aggregate", &aggregate, "wire"_a, "runs"_a, "contributions"_a, "coefficients"_a, "out"_a, nb::kw_only(), "threads"_a,
        "level"_a);
  m.def("copy", &copy, "target"_a, "source"_a, nb::kw_only(), "threads"_a = 1);
  m.def("convert", &convert, "target"_a, "target_dtype"_a, "source"_a, "source_dtype"_a);

  nb::class_<Arena>(m, "Arena")
      .def(nb::init<const std::vector<int>&, const std::vector<int64_t>&, bool>(), "fds"_a, "sizes"_a, nb::kw_only(), "private"_a)
      .def_prop_ro("array", &arena_array)
      .def("remap", &Arena::remap, "fds"_a, "sizes"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("discard_private", &Arena::discard_private, nb::call_guard<nb::gil_scoped_release>());

  nb::class_<Heartbeat>(m, "Heartbeat")
      .def(
          "__init__",
          [](Heartbeat* self, int fd, nb::bytes frame, double interval_s) {
            new (self) Heartbeat(fd, std::string(frame.c_str(), frame.size()), interval_s);
          },
          "fd"_a, "frame"_a, "interval_s"_a)
      .def("stop", &Heartbeat::stop, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("alive", &Heartbeat::alive);

  add_tables(m);
}
