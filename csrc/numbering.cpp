#include "numbering.hpp"

#include <algorithm>
#include <string>
#include <utility>

namespace py = pybind11;

namespace fave_fast {
namespace {

// PySequence_Fast's macros take these two as they are, without a call.
bool is_row(PyObject* value) { return PyList_CheckExact(value) || PyTuple_CheckExact(value); }

}  // namespace

Numbering::Numbering(std::optional<Ints> ids, std::optional<Ints> positions, std::optional<py::dict> texts, Bools gone,
                     bool complete)
    : ids_(std::move(ids)),
      positions_(std::move(positions)),
      texts_(std::move(texts)),
      gone_(std::move(gone)),
      complete_(complete) {
  if (ids_.has_value() == texts_.has_value()) throw py::value_error("expected either ids or texts");
  const auto items = ids_ ? ids_->size() : static_cast<py::ssize_t>(texts_->size());
  if (gone_.ndim() != 1 || gone_.size() != items + 1 || !gone_.data()[0]) {
    throw py::value_error("gone must have shape [" + std::to_string(items + 1) +
                          "], one entry for each number, and be true for 0, which is no item's");
  }
  if (positions_ && (!ids_ || items == 0 || positions_->size() != ids_->data()[items - 1] - ids_->data()[0] + 3)) {
    throw py::value_error("positions must have an entry for each number from the first id to the last, and two more");
  }
}

std::int64_t Numbering::place_of(std::int64_t id) const {
  const std::int64_t items = ids_->size();
  if (items == 0) return -1;
  const std::int64_t* ids = ids_->data();
  if (id < ids[0] || id > ids[items - 1]) return -1;
  if (positions_) return positions_->data()[1 + (id - ids[0])];
  const std::int64_t* found = std::lower_bound(ids, ids + items, id);
  return *found == id ? found - ids : -1;
}

std::optional<std::int64_t> Numbering::place(PyObject* id) const {
  if (ids_) {
    if (!PyLong_CheckExact(id)) return std::nullopt;
    int overflow = 0;
    const std::int64_t value = PyLong_AsLongLongAndOverflow(id, &overflow);
    return overflow != 0 ? -1 : place_of(value);
  }
  if (!PyUnicode_CheckExact(id) || PyUnicode_GET_LENGTH(id) == 0) return std::nullopt;
  PyObject* found = PyDict_GetItemWithError(texts_->ptr(), id);
  if (found == nullptr) {
    if (PyErr_Occurred()) throw py::error_already_set();
    return -1;
  }
  return PyLong_AsLongLong(found);
}

py::object Numbering::number(const py::object& histories) const {
  if (!is_row(histories.ptr())) return py::none();
  const Py_ssize_t users = PySequence_Fast_GET_SIZE(histories.ptr());
  PyObject* const* rows = PySequence_Fast_ITEMS(histories.ptr());
  Py_ssize_t total = 0;
  for (Py_ssize_t user = 0; user < users; ++user) {
    if (!is_row(rows[user])) return py::none();
    total += PySequence_Fast_GET_SIZE(rows[user]);
  }
  py::array_t<std::int32_t> numbers(total);
  py::array_t<std::int64_t> offsets(users + 1), unknown(users);
  std::int32_t* out = numbers.mutable_data();
  std::int64_t* begins = offsets.mutable_data();
  const bool* gone = gone_.data();
  std::int64_t known = 0;
  begins[0] = 0;
  for (Py_ssize_t user = 0; user < users; ++user) {
    const Py_ssize_t length = PySequence_Fast_GET_SIZE(rows[user]);
    PyObject* const* items = PySequence_Fast_ITEMS(rows[user]);
    for (Py_ssize_t at = 0; at < length; ++at) {
      const std::optional<std::int64_t> found = place(items[at]);
      if (!found || (*found < 0 && !complete_)) return py::none();
      const std::int64_t number = *found + 1;
      if (!gone[number]) out[known++] = static_cast<std::int32_t>(number);
    }
    begins[user + 1] = known;
    unknown.mutable_data()[user] = length - (known - begins[user]);
  }
  if (known == total) return py::make_tuple(std::move(numbers), std::move(offsets), std::move(unknown));
  return py::make_tuple(numbers[py::slice(0, known, 1)], std::move(offsets), std::move(unknown));
}

}  // namespace fave_fast
