#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "encoder.hpp"
#include "gpu_encoders.hpp"
#include "gpu_score_topk.hpp"
#include "isa.hpp"
#include "numbering.hpp"
#include "rank_count.hpp"
#include "score_topk.hpp"
#include "step.hpp"
#include "submit.hpp"

namespace py = pybind11;

namespace {

using Floats = py::array_t<float>;
using Ints = py::array_t<std::int64_t>;
using Numbers = py::array_t<std::int32_t>;

template <typename Array>
void require_vector(const Array& array, const char* name, py::ssize_t size) {
  if (array.ndim() != 1 || array.shape(0) != size) {
    throw py::value_error(std::string(name) + " must have shape [" + std::to_string(size) +
                          "], one entry for each row of scores");
  }
  if (size > 1 && array.strides(0) != array.itemsize()) {
    throw py::value_error(std::string(name) + " must be contiguous");
  }
}

void rank_count(const Floats& scores, std::int64_t first_id, const Floats& target_scores, const Ints& target_ids,
                Ints& counts, int threads) {
  if (scores.ndim() != 2) throw py::value_error("scores must have two dimensions, [B, T]");
  const py::ssize_t rows = scores.shape(0), columns = scores.shape(1), itemsize = scores.itemsize();
  if (rows > 0 && columns > 1 && scores.strides(1) != itemsize) {
    throw py::value_error("a row of scores must be contiguous");
  }
  if (scores.strides(0) % itemsize != 0) throw py::value_error("the row stride of scores must be whole elements");
  require_vector(target_scores, "target_scores", rows);
  require_vector(target_ids, "target_ids", rows);
  require_vector(counts, "counts", rows);
  const fave_fast::ScoreTile tile{scores.data(), rows, columns, scores.strides(0) / itemsize, first_id};
  const float* target_scores_data = target_scores.data();
  const std::int64_t* target_ids_data = target_ids.data();
  std::int64_t* counts_data = counts.mutable_data();  // refuses a read-only array
  py::gil_scoped_release release;
  fave_fast::rank_count(tile, target_scores_data, target_ids_data, counts_data, threads);
}

void require_reached(bool reached, const std::string& flag, double timeout) {
  if (reached) return;
  const std::string message = "nothing raised " + flag + " in " + std::to_string(timeout) + " s";
  PyErr_SetString(PyExc_TimeoutError, message.c_str());
  throw py::error_already_set();
}

void wait_flag(std::uint64_t flag, std::uint32_t expected, std::uint64_t stream, double timeout) {
  bool reached;
  {
    py::gil_scoped_release release;
    reached = fave_fast::wait_flag(flag, expected, stream, timeout);
  }
  require_reached(reached, "the flag to " + std::to_string(expected), timeout);
}

void run_graph(fave_fast::Line& line, std::uint64_t graph, double timeout) {
  bool reached;
  {
    py::gil_scoped_release release;
    const auto nothing = [] {};
    reached = line.run(graph, timeout, nothing, nothing);
  }
  require_reached(reached, "the flag", timeout);
}

template <typename T>
T* pointer(std::uint64_t address) {
  return reinterpret_cast<T*>(static_cast<std::uintptr_t>(address));
}

// A captured request: its graph, and where that reads and writes in the host's memory.
struct Request {
  fave_fast::Line& line;
  std::uint64_t graph;
  fave_fast::RequestMemory memory;
  double timeout;

  std::pair<Floats, Ints> run(const py::array_t<std::int32_t, py::array::c_style>& ids,
                              const py::array_t<std::int64_t, py::array::c_style>& offsets, bool exclude) {
    if (ids.ndim() != 1 || offsets.ndim() != 1 || offsets.size() == 0) {
      throw py::value_error("ids and offsets must have one dimension, [T] and [B + 1]");
    }
    const fave_fast::NumberedHistories histories{ids.data(), offsets.data(), offsets.size() - 1};
    if (histories.users > memory.batch || ids.size() > memory.items) {
      throw py::value_error("there are " + std::to_string(histories.users) + " histories of " +
                            std::to_string(ids.size()) + " items; the request takes " + std::to_string(memory.batch) +
                            " of " + std::to_string(memory.items));
    }
    if (histories.offsets[0] != 0 || histories.offsets[histories.users] != ids.size()) {
      throw py::value_error("offsets do not go from 0 to the number of ids, " + std::to_string(ids.size()));
    }
    Floats scores({histories.users, memory.k});
    Ints best({histories.users, memory.k});
    float* scores_data = scores.mutable_data();
    std::int64_t* best_data = best.mutable_data();
    bool reached;
    {
      py::gil_scoped_release release;
      reached = fave_fast::answer(line, graph, timeout, memory, histories, exclude, scores_data, best_data);
    }
    require_reached(reached, "the flag", timeout);
    return {std::move(scores), std::move(best)};
  }
};

void bind_submit(py::module_& m) {
  m.def("launch_graph", &fave_fast::launch_graph, py::arg("graph"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>(),
        "Puts an instantiated CUDA graph on a stream, both given by their handles, and returns. Releases the GIL.\n"
        "Raises RuntimeError where there is no driver, or with the name of the driver's error.");
  m.def("wait_flag", &wait_flag, py::arg("flag"), py::arg("expected"), py::arg("stream"), py::arg("timeout"),
        "Spins until the 32-bit word at the address `flag` is `expected`. Releases the GIL. Asks every millisecond\n"
        "whether the stream has failed, unless it is 0.\n"
        "Raises TimeoutError after `timeout` seconds; RuntimeError where the stream has failed, or is idle and the flag\n"
        "is not raised.");
  m.def("raise_flag", &fave_fast::raise_flag, py::arg("flag"), py::arg("value"),
        "Makes the 32-bit word at the address `flag` `value`; who waits for it sees what was written before, too.");
  py::class_<fave_fast::Line>(m, "Line", "The graphs of one stream, each of which adds one to a flag when it is done.")
      .def(py::init<std::uint64_t, std::uint32_t, std::uint64_t>(), py::arg("flag"), py::arg("count"),
           py::arg("stream"))
      .def("run", &run_graph, py::arg("graph"), py::arg("timeout"),
           "launch_graph, then wait_flag, one caller at a time.");
  py::class_<Request>(m, "Request", "A captured request for up to `batch` histories with `items` items in all.")
      .def(py::init([](fave_fast::Line& line, std::uint64_t graph, std::uint64_t offsets, std::uint64_t exclude_offsets,
                       std::uint64_t ids, std::uint64_t scores, std::uint64_t best, std::int64_t batch,
                       std::int64_t items, std::int64_t k, double timeout) {
             return Request{line,
                            graph,
                            {pointer<std::int32_t>(offsets), pointer<std::int32_t>(exclude_offsets),
                             pointer<std::int32_t>(ids), pointer<const float>(scores),
                             pointer<const std::int64_t>(best), batch, items, k},
                            timeout};
           }),
           py::keep_alive<1, 2>(), py::arg("line"), py::arg("graph"), py::arg("offsets"), py::arg("exclude_offsets"),
           py::arg("ids"), py::arg("scores"), py::arg("best"), py::arg("batch"), py::arg("items"), py::arg("k"),
           py::arg("timeout"))
      .def("run", &Request::run, py::arg("ids"), py::arg("offsets"), py::arg("exclude"),
           "Scores float32 [B, k] and numbers int64 [B, k] for numbered histories: ids int32 [T], offsets int64\n"
           "[B + 1]; with `exclude` without their own items. Callers take turns. Releases the GIL.\n"
           "Raises as wait_flag; ValueError where the histories do not fit.");
}

void bind_numbering(py::module_& m) {
  using fave_fast::Numbering;
  py::class_<Numbering>(m, "Numbering", "The ids of a catalogue, to number histories by.")
      .def(py::init<std::optional<Numbering::Ints>, std::optional<Numbering::Ints>, std::optional<py::dict>,
                    Numbering::Bools, bool>(),
           py::kw_only(), py::arg("ids").noconvert(), py::arg("positions").noconvert(), py::arg("texts"),
           py::arg("gone").noconvert(), py::arg("complete"),
           "Either ids int64 [N], ascending, or texts, a dict of text to place. positions int64 [span + 2] or None: the\n"
           "place of each number from the least id to the greatest, -1 between them and at both ends. gone bool [N + 1].")
      .def("number", &Numbering::number, py::arg("histories"),
           "Numbers int32 [T] of the known items, offsets int64 [B + 1], and how many unknown items each history had,\n"
           "int64 [B]. None where a history is neither list nor tuple, an id not exactly an int (or, with texts, a str that\n"
           "is not empty), or unknown and these ids not complete.");
}

#ifdef FAVE_FAST_HAS_CUDA
constexpr bool kHasCuda = true;

void bind_gpu_kernels(py::module_& m) {
  using fave_fast::EncoderCall;
  using Address = std::uint64_t;
  py::class_<EncoderCall>(m, "EncoderCall", "What csrc/gpu_encoders.hpp says; addresses of device memory.")
      .def(py::init([](Address rows, Address bounds, Address table, Address input_norm, Address shift, Address scale,
                       Address weights, Address norms, Address cos, Address sin, Address out, Address order,
                       Address programs, std::int32_t users, std::int32_t padded_length, std::int32_t longest,
                       std::int32_t blocks, std::int32_t program_count, float anchor, float eps,
                       float input_eps, bool wide_rows, bool wide_bounds, bool layer_norm, bool rotary, bool causal) {
             return EncoderCall{pointer<const void>(rows),
                                pointer<const void>(bounds),
                                pointer<const void>(table),
                                pointer<const float>(input_norm),
                                pointer<const float>(shift),
                                pointer<const float>(scale),
                                pointer<const void>(weights),
                                pointer<const float>(norms),
                                pointer<const float>(cos),
                                pointer<const float>(sin),
                                pointer<void>(out),
                                pointer<const std::int32_t>(order),
                                pointer<const std::int32_t>(programs),
                                users,
                                padded_length,
                                longest,
                                blocks,
                                program_count,
                                anchor,
                                eps,
                                input_eps,
                                wide_rows,
                                wide_bounds,
                                layer_norm,
                                rotary,
                                causal};
           }),
           py::kw_only(), py::arg("rows"), py::arg("bounds"), py::arg("table"), py::arg("input_norm"), py::arg("shift"),
           py::arg("scale"), py::arg("weights"), py::arg("norms"), py::arg("cos"), py::arg("sin"), py::arg("out"),
           py::arg("order"), py::arg("programs"), py::arg("users"), py::arg("padded_length"), py::arg("longest"),
           py::arg("blocks"), py::arg("program_count"), py::arg("anchor"),
           py::arg("eps"), py::arg("input_eps"), py::arg("wide_rows"), py::arg("wide_bounds"), py::arg("layer_norm"),
           py::arg("rotary"), py::arg("causal"));
  m.def("encode_cluster", &fave_fast::launch_cluster_encoder, py::arg("call"), py::kw_only(), py::arg("tiles"),
        py::arg("overlap"), py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
        "Launches the encoder of clusters of 2 * tiles blocks on a stream. Nothing is checked. Releases the GIL. Raises\n"
        "RuntimeError with the name of CUDA's error.");
  m.def("encode_pair", &fave_fast::launch_pair_encoder, py::arg("call"), py::kw_only(), py::arg("overlap"),
        py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
        "The same of the encoder of two blocks a history.");
  m.def("encode_tile", &fave_fast::launch_tile_encoder, py::arg("call"), py::kw_only(), py::arg("tiles"),
        py::arg("overlap"), py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
        "The same of the encoder of 1, 2 or 4 tiles a block.");

  using fave_fast::ListsCall;
  py::class_<ListsCall>(m, "ListsCall", "What csrc/gpu_score_topk.hpp says; addresses of device memory.")
      .def(py::init([](Address queries, Address table, Address deny, Address excluded, Address excluded_offsets,
                       Address entries, Address scores, Address ids, std::int32_t rows, std::int32_t d,
                       std::int32_t items, std::int32_t k, std::int32_t tile, bool wide_excluded, bool wide_offsets) {
             return ListsCall{pointer<const void>(queries),
                              pointer<const void>(table),
                              pointer<const std::uint8_t>(deny),
                              pointer<const void>(excluded),
                              pointer<const void>(excluded_offsets),
                              pointer<std::int64_t>(entries),
                              pointer<float>(scores),
                              pointer<std::int64_t>(ids),
                              rows,
                              d,
                              items,
                              k,
                              tile,
                              wide_excluded,
                              wide_offsets};
           }),
           py::kw_only(), py::arg("queries"), py::arg("table"), py::arg("deny"), py::arg("excluded"),
           py::arg("excluded_offsets"), py::arg("entries"), py::arg("scores"), py::arg("ids"), py::arg("rows"),
           py::arg("d"), py::arg("items"), py::arg("k"), py::arg("tile"), py::arg("wide_excluded"),
           py::arg("wide_offsets"));
  m.def("score_topk_on_gpu", &fave_fast::launch_score_topk, py::arg("call"), py::kw_only(), py::arg("overlap"),
        py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
        "Launches the exact top K of a few queries, likewise.");
}
#else
constexpr bool kHasCuda = false;

void bind_gpu_kernels(py::module_&) {}
#endif
using Halves = py::array_t<std::uint16_t>;  // the bits of bfloat16

// A matrix of floats or of bfloat16, its rows contiguous.
struct Matrix {
  void* data;
  py::ssize_t rows, columns, stride;
  fave_fast::Format format;
};

Matrix matrix_of(const py::array& array, const char* name, bool writable = false) {
  const bool floats = py::isinstance<Floats>(array);
  if (!floats && !py::isinstance<Halves>(array)) {
    throw py::type_error(std::string(name) + " must be float32, or uint16 with the bits of bfloat16");
  }
  if (array.ndim() != 2) throw py::value_error(std::string(name) + " must have two dimensions");
  const py::ssize_t itemsize = array.itemsize();
  if (array.shape(1) > 1 && array.shape(0) > 0 && array.strides(1) != itemsize) {
    throw py::value_error("a row of " + std::string(name) + " must be contiguous");
  }
  if (array.strides(0) % itemsize != 0) {
    throw py::value_error("the row stride of " + std::string(name) + " must be whole elements");
  }
  if (writable && !array.writeable()) throw py::value_error(std::string(name) + " must be writable");
  return {const_cast<void*>(array.data()), array.shape(0), array.shape(1), array.strides(0) / itemsize,
          floats ? fave_fast::Format::fp32 : fave_fast::Format::bf16};
}

// A contiguous array of that shape; -1 stands for any size.
template <typename Array>
void require_shape(const Array& array, const char* name, std::initializer_list<py::ssize_t> shape) {
  bool fits = array.ndim() == static_cast<py::ssize_t>(shape.size());
  std::string expected;
  py::ssize_t i = 0;
  for (const py::ssize_t size : shape) {
    fits = fits && (size < 0 || array.shape(i) == size);
    expected += (i++ == 0 ? "" : ", ") + (size < 0 ? "*" : std::to_string(size));
  }
  if (!fits) throw py::value_error(std::string(name) + " must have shape [" + expected + "]");
  if (!(array.flags() & py::array::c_style)) throw py::value_error(std::string(name) + " must be contiguous");
}

// Packed rows with offsets [B + 1]; or padded on the left to `padded_length` with lengths [B].
fave_fast::Histories histories_of(const Ints& bounds, py::ssize_t padded_length, py::ssize_t rows) {
  require_shape(bounds, "bounds", {-1});
  const std::int64_t* values = bounds.data();
  const py::ssize_t count = bounds.shape(0) - (padded_length == 0 ? 1 : 0);
  fave_fast::Histories histories;
  for (py::ssize_t b = 0; b < count; ++b) {
    const std::int64_t length = padded_length == 0 ? values[b + 1] - values[b] : values[b];
    const std::int64_t start = padded_length == 0 ? values[b] : (b + 1) * padded_length - length;
    if (length < 0 || start < 0 || start + length > rows || (padded_length != 0 && length > padded_length)) {
      throw py::value_error("history " + std::to_string(b) + " is not within the rows");
    }
    if (length > INT32_MAX) throw py::value_error("history " + std::to_string(b) + " is too long");
    histories.starts.push_back(start);
    histories.lengths.push_back(static_cast<int>(length));
  }
  return histories;
}

Matrix output_of(py::array& out, std::size_t batch, int d) {
  const Matrix matrix = matrix_of(out, "out", true);
  require_shape(out, "out", {static_cast<py::ssize_t>(batch), d});
  return matrix;
}

void load_block(fave_fast::Encoder& encoder, int block, const Floats& qkv, const Floats& attention_out,
                const Floats& ffn_in, const Floats& ffn_out, const Floats& attention_norm, const Floats& ffn_norm) {
  const int d = encoder.config().d, hidden = encoder.config().hidden;
  if (block < 0 || block >= encoder.config().blocks) throw py::value_error("there is no such block");
  require_shape(qkv, "qkv", {3 * d, d});
  require_shape(attention_out, "attention_out", {d, d});
  require_shape(ffn_in, "ffn_in", {hidden, d});
  require_shape(ffn_out, "ffn_out", {d, hidden});
  require_shape(attention_norm, "attention_norm", {2, d});
  require_shape(ffn_norm, "ffn_norm", {2, d});
  encoder.load(block, {qkv.data(), attention_out.data(), ffn_in.data(), ffn_out.data(), attention_norm.data(),
                       ffn_norm.data()});
}

void load_ends(fave_fast::Encoder& encoder, const Floats& final_norm, const Floats& cos, const Floats& sin) {
  const fave_fast::EncoderConfig& config = encoder.config();
  require_shape(final_norm, "final_norm", {2, config.d});
  require_shape(cos, "cos", {config.max_length, config.d / config.heads / 2});
  require_shape(sin, "sin", {config.max_length, config.d / config.heads / 2});
  encoder.load_final_norm(final_norm.data());
  encoder.load_rotary(cos.data(), sin.data());
}

void encode(const fave_fast::Encoder& encoder, const py::array& rows, const Ints& bounds, py::ssize_t padded_length,
            py::array& out, int threads) {
  const Matrix from = matrix_of(rows, "rows");
  require_shape(rows, "rows", {-1, encoder.config().d});
  const fave_fast::Histories histories = histories_of(bounds, padded_length, from.rows);
  const Matrix to = output_of(out, histories.lengths.size(), encoder.config().d);
  py::gil_scoped_release release;
  encoder.encode(histories, from.data, from.format, to.data, to.format, threads);
}

fave_fast::InputPath input_path(const fave_fast::EncoderConfig& config, const py::array& table, const Floats& norm,
                                const Floats& shift, const std::optional<Floats>& scale, float anchor) {
  const Matrix items = matrix_of(table, "table");
  require_shape(table, "table", {-1, config.d});
  require_shape(norm, "norm", {2, config.d});
  require_shape(shift, "shift", {config.max_length, config.d});
  if (scale) require_shape(*scale, "scale", {config.max_length, config.d});
  if (items.rows == 0 || !(anchor >= 0 && anchor <= 1)) {
    throw py::value_error("table must have a row 0, and anchor be from 0 to 1");
  }
  return {items.data,   items.format, items.rows - 1,
          norm.data(),  shift.data(), scale ? scale->data() : nullptr,
          anchor};
}

void encode_ids(const fave_fast::Encoder& encoder, const Ints& ids, const Ints& bounds, py::ssize_t padded_length,
                const py::array& table, const Floats& norm, const Floats& shift, const std::optional<Floats>& scale,
                float anchor, py::array& out, int threads) {
  require_shape(ids, "ids", {-1});
  const fave_fast::InputPath path = input_path(encoder.config(), table, norm, shift, scale, anchor);
  const fave_fast::Histories histories = histories_of(bounds, padded_length, ids.shape(0));
  const Matrix to = output_of(out, histories.lengths.size(), encoder.config().d);
  const std::int64_t* ids_data = ids.data();
  py::gil_scoped_release release;
  encoder.encode_ids(histories, ids_data, path, to.data, to.format, threads);
}

using Bools = py::array_t<bool>;

fave_fast::TopkCall topk_call(const py::array& queries, const py::array& table, py::ssize_t k,
                              const std::optional<Ints>& excluded, const std::optional<Ints>& offsets,
                              const std::optional<Bools>& deny, Floats& scores, Ints& ids) {
  const Matrix from = matrix_of(queries, "queries"), items = matrix_of(table, "table");
  if (from.columns != items.columns || from.format != items.format) {
    throw py::value_error("queries and table must have one width and one dtype");
  }
  if (items.rows == 0 || items.rows - 1 > INT32_MAX || items.columns > INT32_MAX || k < 1) {
    throw py::value_error("table must have 1 to 2^31 rows, and k be at least 1");
  }
  if (excluded.has_value() != offsets.has_value()) throw py::value_error("excluded and offsets go together");
  if (excluded) {
    require_shape(*excluded, "excluded", {-1});
    require_shape(*offsets, "offsets", {from.rows + 1});
    const std::int64_t* at = offsets->data();
    for (py::ssize_t b = 0; b < from.rows; ++b) {
      if (at[b] < 0 || at[b + 1] < at[b] || at[b + 1] > excluded->shape(0)) {
        throw py::value_error("offsets do not rise from 0 to the number of excluded ids");
      }
    }
  }
  if (deny) require_shape(*deny, "deny", {items.rows});
  require_shape(scores, "scores", {from.rows, k});
  require_shape(ids, "ids", {from.rows, k});
  return {from.data,
          from.stride,
          from.rows,
          items.data,
          items.stride,
          items.rows - 1,
          static_cast<int>(items.columns),
          from.format,
          k,
          excluded ? excluded->data() : nullptr,
          offsets ? offsets->data() : nullptr,
          deny ? deny->data() : nullptr,
          scores.mutable_data(),
          ids.mutable_data()};
}

// All of a request but its histories, k, and what nobody gets.
class Step {
 public:
  Step(const fave_fast::Encoder& encoder, const py::array& table, const Floats& norm, const Floats& shift,
       const std::optional<Floats>& scale, float anchor)
      : encoder_(encoder),
        path_(input_path(encoder.config(), table, norm, shift, scale, anchor)),
        kept_{table, norm, shift, scale ? py::object(*scale) : py::none()} {
    if (path_.items > INT32_MAX) throw py::value_error("table must have 1 to 2^31 rows");
  }

  py::tuple run(const Numbers& ids, const Ints& offsets, py::ssize_t k, bool exclude, const std::optional<Bools>& deny,
                int threads) const {
    require_shape(ids, "ids", {-1});
    if (deny) require_shape(*deny, "deny", {path_.items + 1});
    if (k < 1) throw py::value_error("k must be at least 1");
    const fave_fast::Histories histories = histories_of(offsets, 0, ids.shape(0));
    const auto users = static_cast<py::ssize_t>(histories.lengths.size());
    Floats scores({users, k});
    Ints best({users, k});
    const fave_fast::StepCall call{histories, ids.data(), offsets.data(), ids.shape(0), exclude,
                                   deny ? deny->data() : nullptr, k, scores.mutable_data(), best.mutable_data()};
    fave_fast::StepSeconds seconds;
    {
      py::gil_scoped_release release;
      seconds = fave_fast::run_step(encoder_, path_, call, threads);
    }
    return py::make_tuple(std::move(scores), std::move(best), seconds.encoder, seconds.topk);
  }

 private:
  const fave_fast::Encoder& encoder_;
  const fave_fast::InputPath path_;
  const py::object kept_[4];  // the memory that the path points to
};

std::unique_ptr<fave_fast::ByteTable> byte_table(const py::array& table, const std::string& isa, int threads) {
  const Matrix items = matrix_of(table, "table");
  if (items.rows == 0 || items.rows - 1 > INT32_MAX || items.columns > INT32_MAX) {
    throw py::value_error("table must have 1 to 2^31 rows");
  }
  const fave_fast::Kernels& kernels = fave_fast::kernels_for(isa);
  py::gil_scoped_release release;
  return std::make_unique<fave_fast::ByteTable>(kernels, items.data, items.stride, items.rows - 1,
                                                static_cast<int>(items.columns), items.format, threads);
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ part of fave_fast: it takes NumPy arrays, addresses and handles, and knows nothing of torch.";
  m.attr("compiler") = compiler();
  m.attr("has_cuda") = kHasCuda;
  // noconvert: a wrong dtype is a TypeError, never a silent copy (counts would be lost in one).
  m.def("rank_count", &rank_count, py::arg("scores").noconvert(), py::arg("first_id"),
        py::arg("target_scores").noconvert(), py::arg("target_ids").noconvert(), py::arg("counts").noconvert(),
        py::arg("threads") = 1,
        "Adds to counts [B] int64, for each row of scores [B, T] float32, the number of columns that come before the\n"
        "target: a higher score, or an equal one with a lower id. Column 0 is the id first_id. A NaN marks a column\n"
        "that is no candidate; it never counts, nor does the target's own. Releases the GIL; splits the rows over\n"
        "`threads` threads.\n"
        "Raises TypeError for a wrong dtype and ValueError for a wrong shape or stride.");
  bind_numbering(m);
  bind_submit(m);
  bind_gpu_kernels(m);
  m.def("instruction_sets", &fave_fast::instruction_sets,
        "Names of the instruction sets that can run here, the fastest first. `isa` of what follows is one of them, or\n"
        "empty for the first.");

  using fave_fast::Encoder;
  py::class_<Encoder>(m, "Encoder", "The packed weights of a network, and its forward pass. Its calls release the GIL.")
      .def(py::init([](int d, int heads, int hidden, int blocks, int max_length, bool layer_norm, bool rotary,
                       bool causal, float eps, float input_eps, bool half, const std::string& isa) {
             return std::make_unique<Encoder>(
                 fave_fast::EncoderConfig{d, heads, hidden, blocks, max_length, layer_norm, rotary, causal, eps,
                                          input_eps, half},
                 fave_fast::kernels_for(isa));
           }),
           py::kw_only(), py::arg("d"), py::arg("heads"), py::arg("hidden"), py::arg("blocks"), py::arg("max_length"),
           py::arg("layer_norm"), py::arg("rotary"), py::arg("causal"), py::arg("eps"), py::arg("input_eps"),
           py::arg("half"), py::arg("isa") = "")
      .def("load_block", &load_block, py::arg("block"), py::arg("qkv").noconvert(),
           py::arg("attention_out").noconvert(), py::arg("ffn_in").noconvert(), py::arg("ffn_out").noconvert(),
           py::arg("attention_norm").noconvert(), py::arg("ffn_norm").noconvert(),
           "Copies a block's matrices [out, in] and norms (gain and bias, [2, d]).")
      .def("load_ends", &load_ends, py::arg("final_norm").noconvert(), py::arg("cos").noconvert(),
           py::arg("sin").noconvert(), "Copies the last norm [2, d] and the rotary tables by age.")
      .def("encode", &encode, py::arg("rows").noconvert(), py::arg("bounds").noconvert(), py::arg("padded_length"),
           py::arg("out").noconvert(), py::arg("threads"),
           "Endpoints [B, d] from rows of E [*, d]. `bounds` are offsets [B + 1] of packed rows, padded_length 0; or\n"
           "lengths [B] of rows padded on the left to padded_length. bfloat16 is given as uint16.")
      .def("encode_ids", &encode_ids, py::arg("ids").noconvert(), py::arg("bounds").noconvert(),
           py::arg("padded_length"), py::arg("table").noconvert(), py::arg("norm").noconvert(),
           py::arg("shift").noconvert(), py::arg("scale").noconvert(), py::arg("anchor"), py::arg("out").noconvert(),
           py::arg("threads"), "Endpoints [B, d] from item ids. Raises ValueError for an id outside the table.")
      .def_property_readonly("isa", [](const Encoder& encoder) { return encoder.kernels().name; });

  m.def(
      "score_topk",
      [](const py::array& queries, const py::array& table, py::ssize_t k, const std::optional<Ints>& excluded,
         const std::optional<Ints>& offsets, const std::optional<Bools>& deny, Floats& scores, Ints& ids, int threads,
         const std::string& isa) {
        const fave_fast::TopkCall call = topk_call(queries, table, k, excluded, offsets, deny, scores, ids);
        const fave_fast::Kernels& kernels = fave_fast::kernels_for(isa);
        py::gil_scoped_release release;
        fave_fast::score_topk(kernels, call, threads);
      },
      py::arg("queries").noconvert(), py::arg("table").noconvert(), py::arg("k"), py::arg("excluded").noconvert(),
      py::arg("offsets").noconvert(), py::arg("deny").noconvert(), py::arg("scores").noconvert(),
      py::arg("ids").noconvert(), py::arg("threads"), py::arg("isa") = "",
      "The k best of items 1 to N of table [N + 1, d] for queries [B, d], into scores and ids [B, k]; what is neither\n"
      "excluded [E] (by offsets [B + 1]) nor denied [N + 1]. Releases the GIL.");

  py::class_<Step>(m, "Step", "A network, its input path and a catalogue, whose memory it reads: requests by one call.")
      .def(py::init<const Encoder&, const py::array&, const Floats&, const Floats&, const std::optional<Floats>&,
                    float>(),
           py::keep_alive<1, 2>(), py::arg("encoder"), py::arg("table").noconvert(), py::arg("norm").noconvert(),
           py::arg("shift").noconvert(), py::arg("scale").noconvert(), py::arg("anchor"))
      .def("run", &Step::run, py::arg("ids").noconvert(), py::arg("offsets").noconvert(), py::arg("k"),
           py::arg("exclude"), py::arg("deny").noconvert(), py::arg("threads"),
           "Scores float32 [B, k], item numbers int64 [B, k], and the seconds of encoder and top K: what\n"
           "Encoder.encode_ids and score_topk with the encoder's instruction set give, to the same bits. ids int32 [T],\n"
           "offsets int64 [B + 1]; with `exclude` without a history's own items; deny bool [N + 1]. Releases the GIL.\n"
           "Raises ValueError for an id outside the table.");

  using fave_fast::ByteTable;
  py::class_<ByteTable>(m, "ByteTable", "A table in 8 bits an element, for lists that equal score_topk's to the bit.")
      .def(py::init(&byte_table), py::arg("table").noconvert(), py::arg("isa") = "", py::arg("threads") = 1)
      .def(
          "score_topk",
          [](ByteTable& bytes, const py::array& queries, const py::array& table, py::ssize_t k,
             const std::optional<Ints>& excluded, const std::optional<Ints>& offsets, const std::optional<Bools>& deny,
             Floats& scores, Ints& ids, int threads) {
            const fave_fast::TopkCall call = topk_call(queries, table, k, excluded, offsets, deny, scores, ids);
            if (call.items != bytes.items() || call.d != bytes.d()) {
              throw py::value_error("table has another shape than the one in bytes");
            }
            py::gil_scoped_release release;
            bytes.score_topk(call, threads);
          },
          py::arg("queries").noconvert(), py::arg("table").noconvert(), py::arg("k"), py::arg("excluded").noconvert(),
          py::arg("offsets").noconvert(), py::arg("deny").noconvert(), py::arg("scores").noconvert(),
          py::arg("ids").noconvert(), py::arg("threads"))
      .def_property_readonly("isa", [](const ByteTable& bytes) { return bytes.kernels().name; })
      .def_property_readonly("nbytes", &ByteTable::bytes)
      .def_property_readonly("asked", &ByteTable::asked)
      .def_property_readonly("fallen_back", &ByteTable::fallen_back);
}
