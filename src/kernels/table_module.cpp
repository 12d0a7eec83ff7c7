#include "table_module.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <cmath>
#include <stdexcept>

#include "arguments.h"
#include "ids.h"
#include "table.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace headwater {
namespace {

constexpr int64_t kDimMax = 65536;
constexpr int64_t kCheckPart = 1 << 16;  // elements
constexpr int64_t kAlone = 1 << 16;      // elements: less than this is not worth waking a thread

std::string text(int64_t number) { return std::to_string(number); }

// An array of one element type, of shape (n) or (n, width); 0: any width.
template <class T>
class Array {
 public:
  Array(nb::handle object, const char* formats, int dimensions, int64_t rows, int64_t width, bool writable, const std::string& what)
      : buffer_(object, formats, sizeof(T), writable, what) {
    const bool fits = buffer_.dimensions() == dimensions && (rows < 0 || buffer_.side(0) == rows) &&
                      (dimensions < 2 || width < 0 || buffer_.side(1) == width) && buffer_.bytes() == side(0) * this->width() * item();
    if (fits) return;
    std::string got;
    for (int i = 0; i < buffer_.dimensions(); i++) got += (i > 0 ? ", " : "") + text(buffer_.side(i));
    refuse("Expected shape (" + (rows < 0 ? "any" : text(rows)) + (dimensions < 2 ? "" : width < 0 ? ", any" : ", " + text(width)) +
           "), got (" + got + ") — " + what + ".");
  }
  T* data() const { return reinterpret_cast<T*>(buffer_.data()); }
  int64_t side(int i) const { return buffer_.side(i); }
  int64_t width() const { return buffer_.dimensions() < 2 ? 1 : buffer_.side(1); }
  int64_t elements() const { return buffer_.bytes() / item(); }
  const Buffer& buffer() const { return buffer_; }

 private:
  static int64_t item() { return static_cast<int64_t>(sizeof(T)); }
  Buffer buffer_;
};

Array<const int64_t> ids_of(nb::handle object) { return {object, "lq", 1, -1, -1, false, "ids, int64"}; }

Array<const float> floats_of(nb::handle object, int64_t rows, int64_t width, const std::string& what) {
  return {object, "f", 2, rows, width, false, what + ", float32"};
}

Array<float> out_of(nb::handle object, int64_t rows, int64_t width) { return {object, "f", 2, rows, width, true, "out, float32"}; }

// Nothing, where there is None.
template <class T>
std::optional<Array<T>> numbers_of(nb::handle object, int64_t count) {
  if (object.is_none()) return {};
  return std::optional<Array<T>>(std::in_place, object, "I", 1, count, -1, !std::is_const_v<T>, "numbers, uint32");
}

Array<const int32_t> indexes_of(nb::handle object, int64_t count, int64_t limit, const std::string& what) {
  Array<const int32_t> found(object, "i", 1, count, -1, false, what + ", int32");
  const int32_t last = static_cast<int32_t>(std::min<int64_t>(limit, INT32_MAX)) - 1;
  uint32_t signs = 0;  // of an index below zero, and of what is left up to the last
  for (int64_t i = 0; i < found.side(0); i++) {
    const uint32_t index = static_cast<uint32_t>(found.data()[i]);
    signs |= index | (static_cast<uint32_t>(last) - index);
  }
  if (signs >> 31 != 0) {
    const auto is_beyond = [last](int32_t index) { return index < 0 || index > last; };
    const int32_t* bad = std::find_if(found.data(), found.data() + found.side(0), is_beyond);
    refuse("Expected indexes from 0 to " + text(limit - 1) + ", got " + text(*bad) + " — " + what + ".");
  }
  return found;
}

void apart(const Buffer& out, const Buffer& other) {
  if (out.data() < other.data() + other.bytes() && other.data() < out.data() + out.bytes()) refuse("The output overlaps an input.");
}

// An array that owns what was in the vector.
template <class T, class... Side>
nb::object array_of(std::vector<T>&& values, Side... sides) {
  auto* kept = new std::vector<T>(std::move(values));
  nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, T, nb::ndim<sizeof...(Side)>>(kept->data(), {static_cast<size_t>(sides)...}, owner));
}
template <class T>
nb::object list_of(std::vector<T>&& values) {
  const size_t count = values.size();
  return array_of(std::move(values), count);
}

// ---- ids -----------------------------------------------------------------------------------------------------

nb::object buckets(nb::handle ids_object) {
  const Array<const int64_t> ids = ids_of(ids_object);
  std::vector<uint8_t> found(static_cast<size_t>(ids.side(0)));
  for (size_t i = 0; i < found.size(); i++) found[i] = static_cast<uint8_t>(bucket_of(hash_of(ids.data()[i])));
  return list_of(std::move(found));
}

nb::object unique(nb::handle ids_object, int servers) {
  const Array<const int64_t> ids = ids_of(ids_object);
  if (servers < 1 || servers > kBuckets) refuse("Expected 1 to " + text(kBuckets) + " servers, got " + text(servers) + ".");
  if (ids.side(0) > INT32_MAX) refuse("Expected fewer than 2^31 ids, got " + text(ids.side(0)) + ".");
  Unique found;
  {
    nb::gil_scoped_release released;
    found = unique_ids(ids.data(), ids.side(0), servers);
  }
  return nb::make_tuple(list_of(std::move(found.ids)), list_of(std::move(found.ends)), list_of(std::move(found.inverse)));
}

bool same_ids(nb::handle ids_object, nb::handle others_object) {
  const Array<const int64_t> ids = ids_of(ids_object), others = ids_of(others_object);
  return ids.side(0) == others.side(0) && std::memcmp(ids.data(), others.data(), static_cast<size_t>(ids.buffer().bytes())) == 0;
}

bool sum_rows_checked(nb::handle rows_object, nb::handle targets_object, nb::handle out_object, nb::handle sources_object,
                      nb::handle weights_object, int threads, const std::string& level_name) {
  const Level& level = level_of(level_name);
  threads_of(threads);
  const Array<float> out = out_of(out_object, -1, -1);
  const Array<const int32_t> targets = indexes_of(targets_object, -1, out.side(0), "targets");
  const int64_t count = targets.side(0);
  const Array<const float> rows = floats_of(rows_object, sources_object.is_none() ? count : -1, out.width(), "rows");
  RowSum sum{rows.data(), targets.data(), nullptr, nullptr, out.data(), count, out.side(0), out.width()};
  std::unique_ptr<Array<const int32_t>> sources;
  std::unique_ptr<Array<const float>> weights;
  if (!sources_object.is_none()) {
    sources = std::make_unique<Array<const int32_t>>(indexes_of(sources_object, count, rows.side(0), "sources"));
    sum.sources = sources->data();
  }
  if (!weights_object.is_none()) {
    weights = std::make_unique<Array<const float>>(weights_object, "f", 1, count, -1, false, "weights, float32");
    sum.weights = weights->data();
  }
  apart(out.buffer(), rows.buffer());
  nb::gil_scoped_release released;
  const PlainFloats plain;
  return sum_rows(sum, threads, *level.rows);
}

void take_rows_checked(nb::handle rows_object, nb::handle sources_object, nb::handle out_object, int threads) {
  threads_of(threads);
  const Array<const float> rows = floats_of(rows_object, -1, -1, "rows");
  const Array<const int32_t> sources = indexes_of(sources_object, -1, rows.side(0), "sources");
  const Array<float> out = out_of(out_object, sources.side(0), rows.width());
  apart(out.buffer(), rows.buffer());
  nb::gil_scoped_release released;
  take_rows(rows.data(), sources.data(), out.data(), sources.side(0), rows.width(), threads);
}

int64_t find_bad(nb::handle rows_object, int threads) {
  threads_of(threads);
  const Buffer rows(rows_object, "f", sizeof(float), false, "rows, float32");
  const int64_t count = rows.bytes() / static_cast<int64_t>(sizeof(float));
  const Level& level = *levels().back();
  std::atomic<int64_t> first{INT64_MAX};
  nb::gil_scoped_release released;
  run_tasks((count + kCheckPart - 1) / kCheckPart, count < kAlone ? 1 : threads, [&](int64_t part) {
    const int64_t at = level.find_non_finite(Wire::float32, rows.data(), part * kCheckPart, std::min(count, (part + 1) * kCheckPart));
    if (at < 0) return true;
    for (int64_t seen = first; at < seen && !first.compare_exchange_weak(seen, at);) {}
    return true;  // an earlier part may still be at work, so nobody is stopped
  });
  return first == INT64_MAX ? -1 : first.load();
}

nb::object hash_ids(nb::sequence strings) {
  std::vector<int64_t> hashes;
  hashes.reserve(nb::len(strings));
  for (nb::handle item : strings) {
    Py_ssize_t bytes = 0;
    const char* found = nullptr;
    if (PyUnicode_Check(item.ptr())) {
      found = PyUnicode_AsUTF8AndSize(item.ptr(), &bytes);
      if (found == nullptr) throw nb::python_error();  // lone surrogates: UnicodeEncodeError, a ValueError
    } else if (PyBytes_Check(item.ptr())) {
      found = PyBytes_AS_STRING(item.ptr());
      bytes = PyBytes_GET_SIZE(item.ptr());
    } else {
      refuse("Expected text or bytes, got " + std::string(nb::type_name(item.type()).c_str()) + " — string " + text(static_cast<int64_t>(hashes.size())) + ".");
    }
    hashes.push_back(static_cast<int64_t>(hash_text(found, static_cast<size_t>(bytes))));
  }
  return list_of(std::move(hashes));
}

// ---- tables --------------------------------------------------------------------------------------------------

struct RuleName {
  const char* name;
  RowRule rule;
  int64_t states, extra;  // floats of state: states·dim + extra
  int64_t scalars;
};
constexpr RuleName kRules[] = {
    {"sgd", RowRule::sgd, 0, 0, 4},
    {"adagrad", RowRule::adagrad, 1, 0, 3},
    {"rowwise_adagrad", RowRule::rowwise_adagrad, 0, 1, 3},
    {"adam", RowRule::adam, 2, 0, 7},
    {"ftrl", RowRule::ftrl, 2, 0, 4},
};

const RuleName& rule_of(const std::string& name) {
  for (const RuleName& rule : kRules) {
    if (name == rule.name) return rule;
  }
  refuse("Expected sgd, adagrad, rowwise_adagrad, adam or ftrl, got " + name + ".");
}

template <class T>
T choice(const std::string& what, const std::string& got, std::initializer_list<std::pair<const char*, T>> options) {
  std::string names;
  for (const auto& [name, value] : options) {
    if (got == name) return value;
    names += (names.empty() ? "" : ", ") + std::string(name);
  }
  refuse("Expected " + what + " to be one of " + names + ", got " + got + ".");
}

void within(const char* what, double value, double low, double high) {
  if (!(value >= low && value <= high)) {
    refuse("Expected " + std::string(what) + " from " + nb::str(nb::float_(low)).c_str() + " to " + nb::str(nb::float_(high)).c_str() +
           ", got " + nb::str(nb::float_(value)).c_str() + ".");
  }
}

// A table and what its arguments are checked against.
class PyTable {
 public:
  PyTable(int64_t dim, const std::string& optimizer, const std::vector<double>& initial_slots, nb::int_ seed, const std::string& initial,
          double scale, int64_t admit_after, int64_t expire_steps, double expire_s, double decay, int64_t budget_bytes,
          const std::string& when_full, const std::string& evict, const std::string& spill_folder, std::pair<int, int> buckets, int stripes, int threads, const std::string& level)
      : rule_(rule_of(optimizer)) {
    TableSettings s = {};
    within("dim", static_cast<double>(dim), 1, kDimMax);
    const int64_t slots = rule_.states * dim + rule_.extra;
    if (static_cast<int64_t>(initial_slots.size()) != slots) {
      refuse("Expected " + text(slots) + " initial slots, got " + text(static_cast<int64_t>(initial_slots.size())) + " — optimizer " + optimizer + ".");
    }
    s.dim = dim;
    s.rule = rule_.rule;
    for (double slot : initial_slots) {
      if (!std::isfinite(slot)) refuse("Expected finite initial slots, got " + std::to_string(slot) + ".");
      s.initial_slots.push_back(static_cast<float>(slot));
    }
    const nb::int_ masked(seed & nb::int_(UINT64_MAX));
    s.seed = nb::cast<uint64_t>(masked);
    s.initial = choice<Initial>("initial", initial, {{"constant", Initial::constant}, {"uniform", Initial::uniform}, {"normal", Initial::normal}});
    if (!std::isfinite(scale)) refuse("Expected a finite scale, got " + std::to_string(scale) + ".");
    s.scale = scale;
    within("admit_after", static_cast<double>(admit_after), 1, kCountMax / kSighting);
    s.admit_after = static_cast<uint32_t>(admit_after);
    within("expire_steps", static_cast<double>(expire_steps), 0, kStepMax);
    within("expire_s", expire_s, 0, kStepMax);
    if (expire_steps > 0 && expire_s > 0) refuse("Expected expire_steps or expire_s, got both: a table has one rule of expiry.");
    s.expires_by_time = expire_s > 0;
    s.expire_after = static_cast<uint32_t>(s.expires_by_time ? std::max(1.0, expire_s) : static_cast<double>(expire_steps));
    if (!(decay > 0.0 && decay <= 1.0)) refuse("Expected a decay above 0 and at most 1, got " + std::to_string(decay) + ".");
    s.decay = decay;
    if (budget_bytes < 0) refuse("Expected budget_bytes of 0 or more, got " + text(budget_bytes) + ".");
    s.budget_bytes = budget_bytes;
    s.spills = choice<bool>("when_full", when_full, {{"evict", false}, {"spill", true}});
    s.spill_folder = spill_folder;
    if (s.spills && (budget_bytes == 0 || spill_folder.empty())) refuse("Expected budget_bytes and spill_folder to spill, got one missing.");
    s.victim = choice<Victim>("evict", evict, {{"lru", Victim::lru}, {"lfu", Victim::lfu}});
    if (buckets.first < 0 || buckets.first >= buckets.second || buckets.second > kBuckets) {
      refuse("Expected buckets [first, limit) within [0, 256), got [" + text(buckets.first) + ", " + text(buckets.second) + ").");
    }
    s.first_bucket = buckets.first;
    s.bucket_limit = buckets.second;
    if (stripes < 1 || stripes > kStripesMax || (stripes & (stripes - 1)) != 0) {
      refuse("Expected stripes to be a power of two up to " + text(kStripesMax) + ", got " + text(stripes) + ".");
    }
    s.stripes = stripes;
    s.threads = threads_of(threads);
    s.level = level_of(level).rows;
    table_ = std::make_unique<Table>(s);
  }
  // To give gigabytes back takes the system a while, for which nobody else need wait.
  ~PyTable() {
    nb::gil_scoped_release released;
    table_.reset();
  }

  int64_t pull(nb::handle ids_object, nb::handle out_object, bool touch, double now, nb::handle numbers_object, bool prefetch) {
    const Array<const int64_t> ids = ids_here(ids_object);
    const Array<float> out = out_of(out_object, ids.side(0), table_->settings().dim);
    const std::optional<Array<uint32_t>> numbers = numbers_of<uint32_t>(numbers_object, ids.side(0));
    apart(out.buffer(), ids.buffer());
    const int64_t time = seconds(now);
    nb::gil_scoped_release released;
    return table_->pull(ids.data(), ids.side(0), out.data(), numbers ? numbers->data() : nullptr, touch, time, prefetch);
  }

  void push(nb::handle ids_object, nb::handle gradients_object, nb::handle scalars_object, int64_t step, double now,
            nb::handle numbers_object) {
    const Array<const int64_t> ids = ids_here(ids_object);
    const Array<const float> gradients = floats_of(gradients_object, ids.side(0), table_->settings().dim, "gradients");
    const Array<const double> scalars(scalars_object, "d", 1, rule_.scalars, -1, false, "scalars, float64");
    float narrow[kRowScalarsMax];
    for (int64_t i = 0; i < rule_.scalars; i++) {
      if (!std::isfinite(scalars.data()[i])) refuse("Expected finite scalars, got " + std::to_string(scalars.data()[i]) + ".");
      narrow[i] = static_cast<float>(scalars.data()[i]);
    }
    const std::optional<Array<const uint32_t>> numbers = numbers_of<const uint32_t>(numbers_object, ids.side(0));
    const int64_t time = seconds(now);
    check_step(step);
    check_budget(ids.side(0));
    nb::gil_scoped_release released;
    const PlainFloats plain;
    table_->push(ids.data(), ids.side(0), gradients.data(), narrow, numbers ? numbers->data() : nullptr, step, time);
  }

  void put(nb::handle ids_object, nb::handle rows_object, nb::handle counts_object, nb::handle last_seen_object, int64_t step, double now) {
    const Array<const int64_t> ids = ids_here(ids_object);
    const int64_t count = ids.side(0);
    const Array<const float> rows = floats_of(rows_object, count, table_->width(), "rows");
    const Array<const float> counts(counts_object, "f", 1, count, -1, false, "counts, float32");
    const Array<const int64_t> last_seen(last_seen_object, "lq", 1, count, -1, false, "last seen, int64");
    for (int64_t i = 0; i < count; i++) {
      within("a count", counts.data()[i], 0, kCountMax / kSighting);
      within("last seen", static_cast<double>(last_seen.data()[i]), 0, kStepMax);
    }
    const int64_t time = seconds(now);
    check_step(step);
    if (!table_->settings().spills) check_budget(count);
    nb::gil_scoped_release released;
    table_->put(ids.data(), count, rows.data(), counts.data(), last_seen.data(), step, time);
  }

  void prefetch(nb::handle ids_object) {
    const Array<const int64_t> ids = ids_here(ids_object);
    nb::gil_scoped_release released;
    table_->prefetch(ids.data(), ids.side(0));
  }

  int64_t erase(nb::handle ids_object) {
    const Array<const int64_t> ids = ids_here(ids_object);
    nb::gil_scoped_release released;
    return table_->erase(ids.data(), ids.side(0));
  }

  int64_t sweep(int64_t step, double now) {
    const int64_t time = seconds(now);
    check_step(step);
    nb::gil_scoped_release released;
    return table_->sweep(step, time);
  }

  nb::object export_rows(int64_t cursor, int64_t limit) {
    if (limit < 1) refuse("Expected a limit of 1 row or more, got " + text(limit) + ".");
    if (cursor < 0 || cursor >> 32 >= kBuckets) refuse("Expected 0 or a cursor that export returned, got " + text(cursor) + ".");
    Rows rows;
    {
      nb::gil_scoped_release released;
      rows = table_->export_rows(cursor, limit);
    }
    const size_t count = rows.ids.size();
    return nb::make_tuple(list_of(std::move(rows.ids)), array_of(std::move(rows.values), count, table_->width()),
                          list_of(std::move(rows.counts)), list_of(std::move(rows.last_seen)), rows.next);
  }

  void track(const std::string& consumer) {
    if (consumer.empty()) refuse("Expected a consumer's name, got none.");
    if (!table_->track(consumer)) refuse("Expected at most " + text(kConsumersMax) + " consumers, got one more: '" + consumer + "'.");
  }

  void untrack(const std::string& consumer) {
    if (consumer.empty() || !table_->untrack(consumer)) refuse_consumer(consumer);
  }

  nb::object changes(const std::string& consumer, int64_t limit) {
    if (limit < 1) refuse("Expected a limit of 1 row or more, got " + text(limit) + ".");
    Changes found;
    bool is_known;
    {
      nb::gil_scoped_release released;
      is_known = !consumer.empty() && table_->changes(consumer, limit, &found);
    }
    if (!is_known) refuse_consumer(consumer);
    const size_t count = found.written.ids.size();
    return nb::make_tuple(list_of(std::move(found.written.ids)), array_of(std::move(found.written.values), count, table_->width()),
                          list_of(std::move(found.written.counts)), list_of(std::move(found.written.last_seen)),
                          list_of(std::move(found.deleted)), found.step, found.restart, found.more);
  }

  nb::dict stats() {
    TableStats now;
    {
      nb::gil_scoped_release released;
      now = table_->stats();
    }
    nb::dict found;
    const std::pair<const char*, int64_t> all[] = {
        {"rows", now.rows}, {"spilled_rows", now.spilled_rows}, {"bytes", now.bytes}, {"budget_bytes", now.budget_bytes},
        {"spilled_bytes", now.spilled_bytes}, {"rows_max", now.rows_max}, {"step", now.step},
        {"admitted", now.admitted}, {"refused", now.refused}, {"evicted", now.evicted}, {"expired", now.expired},
        {"deleted", now.deleted}, {"spilled", now.spilled}, {"loaded", now.loaded}, {"hits", now.hits}, {"misses", now.misses},
    };
    for (const auto& [name, value] : all) found[name] = value;
    return found;
  }

  int64_t bytes() {
    nb::gil_scoped_release released;
    return table_->bytes();
  }

 private:
  Array<const int64_t> ids_here(nb::handle object) const {
    Array<const int64_t> ids = ids_of(object);
    const int first = table_->settings().first_bucket, limit = table_->settings().bucket_limit;
    if (first == 0 && limit == kBuckets) return ids;
    for (int64_t i = 0; i < ids.side(0); i++) {
      const int bucket = bucket_of(hash_of(ids.data()[i]));
      if (bucket < first || bucket >= limit) {
        refuse("Expected ids of the buckets [" + text(first) + ", " + text(limit) + "), got one of bucket " + text(bucket) + " — id " +
               text(ids.data()[i]) + ".");
      }
    }
    return ids;
  }

  int64_t seconds(double now) const {
    if (!table_->settings().expires_by_time) return 0;
    within("now", now, 0, kStepMax);
    return static_cast<int64_t>(now);
  }

  void check_step(int64_t step) const {
    const int64_t low = std::max<int64_t>(1, table_->step());
    if (step < low || step > kStepMax) refuse("Expected a step from " + text(low) + " to " + text(kStepMax) + ", got " + text(step) + ".");
  }

  void check_budget(int64_t count) const {
    const int64_t limit = table_->rows_max();
    if (limit > 0 && count > limit) {
      refuse("Expected at most " + text(limit) + " ids, which is what a budget of " + text(table_->settings().budget_bytes) +
             " bytes holds, got " + text(count) + ": raise the budget or send smaller batches.");
    }
  }

  [[noreturn]] static void refuse_consumer(const std::string& consumer) {
    refuse("Expected a tracked consumer, got '" + consumer + "': call track first.");
  }

  const RuleName& rule_;
  std::unique_ptr<Table> table_;
};

}  // namespace

void add_tables(nb::module_& m) {
  m.def("bucket_of", &buckets, "ids"_a);
  m.def("unique", &unique, "ids"_a, "servers"_a = 1);
  m.def("same_ids", &same_ids, "ids"_a, "others"_a);
  m.def("sum_rows", &sum_rows_checked, "rows"_a, "targets"_a, "out"_a, nb::kw_only(), "sources"_a = nb::none(), "weights"_a = nb::none(),
        "threads"_a = 1, "level"_a = "auto");
  m.def("take_rows", &take_rows_checked, "rows"_a, "sources"_a, "out"_a, nb::kw_only(), "threads"_a = 1);
  m.def("find_bad", &find_bad, "rows"_a, nb::kw_only(), "threads"_a = 1);
  m.def("hash_ids", &hash_ids, "strings"_a);

  nb::class_<PyTable>(m, "Table")
      .def(nb::init<int64_t, const std::string&, const std::vector<double>&, nb::int_, const std::string&, double, int64_t, int64_t,
                    double, double, int64_t, const std::string&, const std::string&, const std::string&, std::pair<int, int>, int, int,
                    const std::string&>(),
           "dim"_a, "optimizer"_a, "initial_slots"_a, nb::kw_only(), "seed"_a = nb::int_(0), "initial"_a = "uniform", "scale"_a = 0.0,
           "admit_after"_a = 1, "expire_steps"_a = 0, "expire_s"_a = 0.0, "decay"_a = 1.0, "budget_bytes"_a = 0, "when_full"_a = "evict",
           "evict"_a = "lru", "spill_folder"_a = "",
           "buckets"_a = std::pair<int, int>(0, kBuckets), "stripes"_a = kStripesMax, "threads"_a = 1, "level"_a = "auto")
      .def("pull", &PyTable::pull, "ids"_a, "out"_a, nb::kw_only(), "touch"_a, "now"_a, "numbers"_a = nb::none(),
           "prefetch"_a = true)
      .def("push", &PyTable::push, "ids"_a, "gradients"_a, "scalars"_a, nb::kw_only(), "step"_a, "now"_a, "numbers"_a = nb::none())
      .def("put", &PyTable::put, "ids"_a, "rows"_a, "counts"_a, "last_seen"_a, nb::kw_only(), "step"_a, "now"_a)
      .def("prefetch", &PyTable::prefetch, "ids"_a)
      .def("delete", &PyTable::erase, "ids"_a)
      .def("sweep", &PyTable::sweep, nb::kw_only(), "step"_a, "now"_a)
      .def("export", &PyTable::export_rows, "cursor"_a = 0, "limit"_a = 1 << 16)
      .def("track", &PyTable::track, "consumer"_a)
      .def("untrack", &PyTable::untrack, "consumer"_a)
      .def("changes", &PyTable::changes, "consumer"_a, "limit"_a = int64_t{1} << 62)
      .def("stats", &PyTable::stats)
      .def_prop_ro("bytes", &PyTable::bytes);
}

}  // namespace headwater
