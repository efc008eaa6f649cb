// Original ids to item numbers, many histories at a time, without a step of Python an id.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

namespace fave_fast {

// The ids of a catalogue: item number n has the n-th of the ascending whole numbers `ids`, or the text whose place in
// `texts` is n - 1. `gone` [N + 1] says of each number whether no item has it. Where they are not `complete`, there are
// items besides.
class Numbering {
 public:
  using Ints = pybind11::array_t<std::int64_t, pybind11::array::c_style>;
  using Bools = pybind11::array_t<bool, pybind11::array::c_style>;

  // Exactly one of `ids` and `texts` is given. `positions`, where it is given, is the table that makes finding a number
  // one access: entry 1 + id - ids[0], and -1 where there is none.
  Numbering(std::optional<Ints> ids, std::optional<Ints> positions, std::optional<pybind11::dict> texts, Bools gone,
            bool complete);

  // Numbers int32 [T] of the known items, end to end, int64 [B + 1] where each history begins, and int64 [B] how many
  // unknown items it had. None where a history is neither a list nor a tuple, or an id is not of the catalogue's kind,
  // exactly int or exactly str, or may be one of the items besides: Python has to say then. Holds the GIL.
  pybind11::object number(const pybind11::object& histories) const;

 private:
  // The place of an id, -1 where it is unknown; nothing where it is not of the catalogue's kind.
  std::optional<std::int64_t> place(PyObject* id) const;
  std::int64_t place_of(std::int64_t id) const;

  std::optional<Ints> ids_, positions_;
  std::optional<pybind11::dict> texts_;
  Bools gone_;
  bool complete_;
};

}  // namespace fave_fast
