#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "rank_count.hpp"
#include "submit.hpp"

namespace py = pybind11;

namespace {

using Floats = py::array_t<float>;
using Ints = py::array_t<std::int64_t>;

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

void require_reached(bool reached, std::uint32_t expected, double timeout) {
  if (reached) return;
  const std::string message =
      "nothing raised the flag to " + std::to_string(expected) + " in " + std::to_string(timeout) + " s";
  PyErr_SetString(PyExc_TimeoutError, message.c_str());
  throw py::error_already_set();
}

void wait_flag(std::uint64_t flag, std::uint32_t expected, std::uint64_t stream, double timeout) {
  bool reached;
  {
    py::gil_scoped_release release;
    reached = fave_fast::wait_flag(flag, expected, stream, timeout);
  }
  require_reached(reached, expected, timeout);
}

void run_graph(std::uint64_t graph, std::uint64_t stream, std::uint64_t flag, std::uint32_t expected, double timeout) {
  bool reached;
  {
    py::gil_scoped_release release;
    fave_fast::launch_graph(graph, stream);
    reached = fave_fast::wait_flag(flag, expected, stream, timeout);
  }
  require_reached(reached, expected, timeout);
}

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
  m.def("run_graph", &run_graph, py::arg("graph"), py::arg("stream"), py::arg("flag"), py::arg("expected"),
        py::arg("timeout"), "launch_graph, then wait_flag.");
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
  // noconvert: a wrong dtype is a TypeError, never a silent copy (counts would be lost in one).
  m.def("rank_count", &rank_count, py::arg("scores").noconvert(), py::arg("first_id"),
        py::arg("target_scores").noconvert(), py::arg("target_ids").noconvert(), py::arg("counts").noconvert(),
        py::arg("threads") = 1,
        "Adds to counts [B] int64, for each row of scores [B, T] float32, the number of columns that come before the\n"
        "target: a higher score, or an equal one with a lower id. Column 0 is the id first_id. A NaN marks a column\n"
        "that is no candidate; it never counts, nor does the target's own. Releases the GIL; splits the rows over\n"
        "`threads` threads.\n"
        "Raises TypeError for a wrong dtype and ValueError for a wrong shape or stride.");
  bind_submit(m);
}
