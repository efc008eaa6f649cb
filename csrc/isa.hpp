// Which instruction sets this machine has, and the kernels for one of them.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace fave_fast {

// Names of the instruction sets that can run here, the fastest first; the last is "scalar".
std::vector<std::string> instruction_sets();

// The kernels for the instruction set of that name, for the fastest if it is empty.
// Throws std::invalid_argument where it cannot run here.
const Kernels& kernels_for(const std::string& name);

}  // namespace fave_fast
