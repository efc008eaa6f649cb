// The network from the input E, or from item ids, to the endpoint of packed histories.
#pragma once

#include <cstdint>
#include <vector>

#include "buffer.hpp"
#include "kernels.hpp"

namespace fave_fast {

struct EncoderConfig {
  int d;
  int heads;
  int hidden;  // of the feed-forward
  int blocks;
  int max_length;
  bool layer_norm;  // else RMSNorm
  bool rotary;
  bool causal;
  float eps;        // of the blocks' norms
  float input_eps;  // of the embeddings' norm
  bool half;        // of bfloat16: products of what the instruction set has for that; else of floats
};

// One block's weights, each [out, in] row by row, and the norms' gain and bias [2, d].
struct BlockWeights {
  const float* qkv;            // [3 d, d]
  const float* attention_out;  // [d, d]
  const float* ffn_in;         // [hidden, d]
  const float* ffn_out;        // [d, hidden]
  const float* attention_norm;
  const float* ffn_norm;
};

// What E of eq. (9) needs besides the history; all float32 but the table.
struct InputPath {
  const void* table;  // [items + 1, d]
  Format format;
  std::int64_t items;
  const float* norm;   // [2, d]
  const float* shift;  // [max_length, d] by age
  const float* scale;  // [max_length, d] by age, or null: no anchor
  float anchor;        // which item is the anchor: the floor(anchor n)-th of n
};

// The rows of B histories end to end, the newest item last.
struct Histories {
  std::vector<std::int64_t> starts;  // [B]: where each begins in what came from outside
  std::vector<int> lengths;          // [B]
};

class Team;

class Encoder {
 public:
  // Throws std::invalid_argument where the sizes do not fit.
  Encoder(const EncoderConfig& config, const Kernels& kernels);
  ~Encoder();

  // Not while another thread encodes.
  void load(int block, const BlockWeights& weights);
  void load_final_norm(const float* gain_and_bias);
  void load_rotary(const float* cos, const float* sin);  // [max_length, d / heads / 2] by age

  // out [B, d] from rows of E [*, d]. Of a history longer than max_length the newest items count; one without items
  // gets zeros.
  void encode(const Histories& histories, const void* rows, Format format, void* out, Format out_format,
              int threads) const;

  // out [B, d] from ids in 0 to path.items; 0 is a place that nobody looks at.
  void encode_ids(const Histories& histories, const std::int64_t* ids, const InputPath& path, void* out,
                  Format out_format, int threads) const;

  const EncoderConfig& config() const { return config_; }
  const Kernels& kernels() const { return kernels_; }

 private:
  struct Packed;
  struct Block;
  struct Call;
  struct Group;
  struct Scratch;

  Packed pack(const float* weights, int out, int in) const;
  Norm norm_of(const Buffer<float>& padded) const;
  Histories newest_of(Histories histories) const;
  void run(const Call& call, int threads) const;
  static std::vector<Group> groups_of(const std::vector<int>& lengths, std::int64_t total, int members);
  void run_group(const Call& call, const Group& group, Scratch& shared, Scratch& own, Team& team, int member) const;
  void put_input(const Call& call, const Group& group, int begin, int end, float* h) const;
  void put_newest(const Call& call, const Group& group, int begin, int end, Scratch& shared, Scratch& own) const;
  void attend(const Call& call, const Group& group, bool last, Scratch& shared, Scratch& own, int members,
              int member) const;
  void run_newest(const Call& call, std::int64_t begin, std::int64_t end, Scratch& own) const;

  const EncoderConfig config_;
  const Kernels& kernels_;
  const Operand operand_;
  std::vector<Block> blocks_;
  Buffer<float> final_norm_, cos_, sin_;
};

}  // namespace fave_fast
