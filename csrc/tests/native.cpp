// The engine without Python, for the sanitizers (sanitize.sh): drawn requests on every instruction set, callers side by
// side. Answers must not depend on batch, place or threads, and lists must equal a full sort. Returns 1 where one does.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../encoder.hpp"
#include "../formats.hpp"
#include "../isa.hpp"
#include "../rank_count.hpp"
#include "../score_topk.hpp"
#include "../step.hpp"

namespace {

using fave_fast::Format;
using Random = std::mt19937;

std::atomic<int> failures{0};

void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "%s\n", what.c_str());
}

int draw(Random& random, int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); }

std::vector<float> floats(Random& random, std::size_t count, float size) {
  std::normal_distribution<float> normal(0.0f, size);
  std::vector<float> result(count);
  for (float& x : result) x = normal(random);
  return result;
}

// Sizes that fill no vector, and ones that do.
struct Model {
  static constexpr int kItems = 40;
  fave_fast::EncoderConfig config;
  fave_fast::Encoder encoder;
  std::vector<float> table, norm, shift, scale;
  std::vector<std::uint16_t> half_table;

  Model(Random& random, const fave_fast::Kernels& kernels, int d, int heads, bool half, bool other)
      : config{d, heads, 3 * d, 2, 21, other, !other, other, 1e-5f, 1e-5f, half}, encoder(config, kernels) {
    const auto n = static_cast<std::size_t>(d);
    norm = floats(random, 2 * n, 1.0f);
    shift = floats(random, 21 * n, 0.1f);
    scale = floats(random, 21 * n, 0.1f);
    table = floats(random, (kItems + 1) * n, 1.0f);
    for (const float x : table) half_table.push_back(fave_fast::narrowed(x));
    for (int block = 0; block < 2; ++block) {
      const std::vector<float> qkv = floats(random, 3 * n * n, 0.2f), out = floats(random, n * n, 0.2f),
                               first = floats(random, 3 * n * n, 0.2f), second = floats(random, 3 * n * n, 0.2f);
      encoder.load(block, {qkv.data(), out.data(), first.data(), second.data(), norm.data(), norm.data()});
    }
    encoder.load_final_norm(norm.data());
    const std::vector<float> angles = floats(random, 21 * n, 1.0f);
    encoder.load_rotary(angles.data(), angles.data());
  }

  fave_fast::InputPath path(Format format) const {
    const void* rows = format == Format::fp32 ? static_cast<const void*>(table.data()) : half_table.data();
    return {rows, format, kItems, norm.data(), shift.data(), scale.data(), 0.5f};
  }

  std::vector<float> encode(const fave_fast::Histories& histories, const std::vector<std::int64_t>& ids,
                            int threads) const {
    std::vector<float> out(histories.lengths.size() * config.d, std::nanf(""));
    encoder.encode_ids(histories, ids.data(), path(Format::fp32), out.data(), Format::fp32, threads);
    return out;
  }
};

// Histories end to end.
struct Drawn {
  fave_fast::Histories histories;
  std::vector<std::int64_t> ids, offsets{0};

  Drawn(Random& random, int most) {
    for (int b = 0, count = draw(random, 1, most); b < count; ++b) {
      histories.starts.push_back(offsets.back());
      histories.lengths.push_back(draw(random, 0, 30));
      for (int i = 0; i < histories.lengths.back(); ++i) ids.push_back(draw(random, 0, Model::kItems));
      offsets.push_back(static_cast<std::int64_t>(ids.size()));
    }
  }
};

void test_encoder(const Model& model, unsigned seed) {
  Random random(seed);
  const Drawn drawn(random, 40);
  const fave_fast::Histories& histories = drawn.histories;
  const std::vector<std::int64_t>& ids = drawn.ids;
  const std::vector<float> together = model.encode(histories, ids, draw(random, 1, 3));
  const int d = model.config.d;
  for (std::size_t b = 0; b < histories.lengths.size(); ++b) {
    const std::vector<float> alone =
        model.encode({{histories.starts[b]}, {histories.lengths[b]}}, ids, draw(random, 1, 2));
    expect(std::equal(alone.begin(), alone.end(), together.begin() + b * d),
           std::string("a history alone has other bits: ") + model.encoder.kernels().name);
  }
}

void test_step(const Model& model, unsigned seed) {
  Random random(seed);
  const Drawn drawn(random, 20);
  const Format format = draw(random, 0, 1) == 1 ? Format::bf16 : Format::fp32;
  const bool exclude = draw(random, 0, 1) == 1;
  const int k = draw(random, 1, Model::kItems + 4), d = model.config.d;
  const auto users = static_cast<std::int64_t>(drawn.histories.lengths.size());
  const fave_fast::InputPath path = model.path(format);
  bool deny[Model::kItems + 1];
  for (bool& denied : deny) denied = draw(random, 0, 9) == 0;

  std::vector<float> endpoints(users * d), scores(users * k), expected_scores(users * k);  // room for either format
  std::vector<std::int64_t> best(users * k, -7), expected_best(users * k, -8);
  model.encoder.encode_ids(drawn.histories, drawn.ids.data(), path, endpoints.data(), format, draw(random, 1, 3));
  fave_fast::score_topk(model.encoder.kernels(),
                        {endpoints.data(), d, users, path.table, d, Model::kItems, d, format, k,
                         exclude ? drawn.ids.data() : nullptr, exclude ? drawn.offsets.data() : nullptr, deny,
                         expected_scores.data(), expected_best.data()},
                        draw(random, 1, 3));

  const std::vector<std::int32_t> ids(drawn.ids.begin(), drawn.ids.end());
  const fave_fast::StepCall call{drawn.histories, ids.data(), drawn.offsets.data(), drawn.offsets.back(), exclude, deny,
                                 k, scores.data(), best.data()};
  const fave_fast::StepSeconds seconds = fave_fast::run_step(model.encoder, path, call, draw(random, 1, 3));
  expect(best == expected_best && scores == expected_scores,
         std::string("one call has other lists than two: ") + model.encoder.kernels().name);
  expect(seconds.encoder > 0 && seconds.topk > 0, "a step took no time");
}

void test_lists(const fave_fast::Kernels& kernels, unsigned seed) {
  Random random(seed);
  const int batch = draw(random, 1, 19), items = draw(random, 0, 300), d = draw(random, 1, 40);
  const int k = draw(random, 1, items + 4), threads = draw(random, 1, 3);
  const bool half = draw(random, 0, 1) == 1;
  std::vector<float> queries(batch * d), table((items + 1) * d);
  for (float& x : queries) x = static_cast<float>(draw(random, -2, 2));
  for (float& x : table) x = static_cast<float>(draw(random, -2, 2));
  if (items > 2) table[2 * d] = std::nanf("");
  std::vector<std::uint16_t> half_queries, half_table;
  for (const float x : queries) half_queries.push_back(fave_fast::narrowed(x));
  for (const float x : table) half_table.push_back(fave_fast::narrowed(x));
  std::vector<std::int64_t> excluded, offsets{0};
  for (int b = 0; b < batch; ++b) {
    for (int i = 0, count = draw(random, 0, 30); i < count; ++i) excluded.push_back(draw(random, -1, items + 2));
    offsets.push_back(static_cast<std::int64_t>(excluded.size()));
  }
  const std::unique_ptr<bool[]> deny(new bool[items + 1]);
  for (int i = 0; i <= items; ++i) deny[i] = draw(random, 0, 9) == 0;
  std::vector<float> scores(batch * k);
  std::vector<std::int64_t> ids(batch * k);
  const Format format = half ? Format::bf16 : Format::fp32;
  const void* from = half ? static_cast<const void*>(half_queries.data()) : queries.data();
  const void* rows = half ? static_cast<const void*>(half_table.data()) : table.data();
  const fave_fast::TopkCall call{from,   d, batch, rows,          d, items,         d, format, k, excluded.data(),
                                 offsets.data(), deny.get(), scores.data(), ids.data()};
  fave_fast::ByteTable bytes(kernels, rows, d, items, d, format, threads);
  for (const bool plain : {true, false}) {
    std::fill(ids.begin(), ids.end(), -7);
    if (plain) {
      fave_fast::score_topk(kernels, call, threads);
    } else {
      bytes.score_topk(call, threads);
    }
    for (int b = 0; b < batch; ++b) {
      std::vector<std::pair<float, std::int64_t>> left;  // minus score, id
      for (int i = 1; i <= items; ++i) {
        float score = 0;
        for (int c = 0; c < d; ++c) score += queries[b * d + c] * table[i * d + c];
        const auto begin = excluded.begin() + offsets[b], end = excluded.begin() + offsets[b + 1];
        if (!std::isnan(score) && !deny[i] && std::find(begin, end, i) == end) left.emplace_back(-score, i);
      }
      std::sort(left.begin(), left.end());
      for (int i = 0; i < k; ++i) {
        const std::int64_t id = i < static_cast<int>(left.size()) ? left[i].second : 0;
        expect(ids[b * k + i] == id, std::string("a list is not the full sort's: ") + kernels.name);
      }
    }
  }
}

void test_ranks(unsigned seed) {
  Random random(seed);
  const std::vector<float> scores = floats(random, 3 * 400'000, 1.0f);
  const float targets[] = {0.5f, -1.0f, 3.0f};
  const std::int64_t ids[] = {7, 399'999, 0};
  std::int64_t one[3] = {}, three[3] = {};
  fave_fast::rank_count({scores.data(), 3, 400'000, 400'000, 0}, targets, ids, one, 1);
  fave_fast::rank_count({scores.data(), 3, 400'000, 400'000, 0}, targets, ids, three, 3);
  expect(std::equal(one, one + 3, three), "counts depend on the threads");
}

}  // namespace

int main() {
  for (const std::string& name : fave_fast::instruction_sets()) {
    const fave_fast::Kernels& kernels = fave_fast::kernels_for(name);
    Random random(1);
    const Model small(random, kernels, 20, 2, true, true), whole(random, kernels, 64, 2, true, false),
        odd(random, kernels, 36, 3, false, false);
    std::vector<std::thread> callers;
    for (unsigned caller = 0; caller < 3; ++caller) {
      callers.emplace_back([&, caller] {
        for (unsigned seed = caller; seed < 12; seed += 3) {
          for (const Model* model : {&small, &whole, &odd}) {
            test_encoder(*model, seed);
            test_step(*model, seed);
          }
          test_lists(kernels, seed);
        }
      });
    }
    for (std::thread& caller : callers) caller.join();
  }
  test_ranks(0);
  std::printf("%d failures\n", failures.load());
  return failures == 0 ? 0 : 1;
}
