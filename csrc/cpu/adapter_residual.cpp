// The torch side of adapter_residual on a CPU; pyfused/ops/adapter_residual.py has the contract.
#include "adapter_residual.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "../operators.h"
#include "kernels.h"
#include "parallel.h"

namespace pyfused {
namespace {

Tensor nothing(Number number, const Tensor& like) { return empty({0}, number, like); }

int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
int64_t ratio_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

/// Floats in one tensor, in parts: reserved, then allocated together.
class Floats {
 public:
  struct Part {
    int64_t first = 0, count = 0;
    bool wanted = false;
  };
  Part reserve(int64_t count, bool wanted = true) {
    if (!wanted) return {};
    const Part part{size_, count, true};
    size_ += with_guard(count);
    return part;
  }
  void allocate(const Tensor& like) {
    memory_ = empty({size_}, Number::kFloat32, like);
    data_ = mutable_data<float>(*memory_);
  }
  /// Null where the part is not wanted.
  float* operator[](const Part& part) const {
    if (!part.wanted) return nullptr;
    guarded(data_ + part.first, part.count);
    return data_ + part.first;
  }

 private:
  int64_t size_ = 0;
  OptionalTensor memory_;
  float* data_ = nullptr;
};

OptionalTensor float32(const OptionalTensor& tensor) {
  using torch::headeronly::ScalarType;
  if (!tensor || (tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous())) return tensor;
  return torch::stable::contiguous(torch::stable::to(*tensor, ScalarType::Float));
}

/// Rows that are computed, and those that are not.
struct Samples {
  std::vector<Span> live, dropped;
  int64_t rows = 0, dropped_rows = 0;  // rows: those that are live
  int64_t length;

  Samples(int64_t batch, int64_t length, const float* scales, int64_t samples) : length(length) {
    // A span lies in one image, and in samples of one kind.
    const int64_t per_sample = scales ? batch * length / samples : batch * length;
    for (int64_t row = 0; row < batch * length;) {
      int64_t end = std::min((row / per_sample + 1) * per_sample, (row / length + 1) * length);
      const bool drops = scales && scales[row / per_sample] == 0.0f;
      auto& spans = drops ? dropped : live;
      int64_t& at = drops ? dropped_rows : rows;
      if (!spans.empty() && spans.back().row + spans.back().count == row && row % length != 0) {
        spans.back().count += end - row;
      } else {
        spans.push_back({row, at, end - row});
      }
      at += end - row;
      row = end;
    }
  }

  Live of(const std::vector<Span>& spans) const {
    return {spans.data(), static_cast<int64_t>(spans.size()), length};
  }
};

/// Work on rows, the same share for each thread.
class RowTasks : public Tasks {
 public:
  /// `work`: multiplications of all rows.
  RowTasks(int64_t rows, int64_t work) : Tasks(ratio_up(rows, kUnit), work), rows_(rows) {}

  /// Calls body(first, count, task) for every block, of kMostRows at the most.
  template <class Body>
  void run(const Body& body) const {
    Tasks::run([&](int64_t begin, int64_t end, int64_t task) {
      const int64_t mine = end - begin, blocks = ratio_up(mine * kUnit, kMostRows);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = kUnit * (begin + mine * block / blocks);
        const int64_t last = std::min(rows_, kUnit * (begin + mine * (block + 1) / blocks));
        body(first, last - first, task);
      }
    });
  }

 private:
  // Whole vectors of rows.
  static constexpr int64_t kUnit = 16;
  static_assert(kMostRows % kUnit == 0);
  int64_t rows_;
};

Adapter adapter_of(const Tensor& like, const Tensor& down, const OptionalTensor& down_bias, const Tensor& up,
                   const OptionalTensor& up_bias, const OptionalTensor& gamma, const OptionalTensor& scale,
                   const OptionalTensor& seed, const Samples& samples, int64_t rows, double skip,
                   const std::string& activation, double dropout_p) {
  Adapter p{};
  p.down = const_rows(down);
  p.up = const_rows(up);
  p.down_bias = const_vector(down_bias);
  p.up_bias = const_vector(up_bias);
  p.gamma = const_vector(gamma);
  p.sample_scale = scale ? const_data<float>(*scale) : nullptr;
  p.per_sample = scale ? rows / scale->numel() : 1;
  p.channels = down.size(1);
  p.width = down.size(0);
  p.live = samples.of(samples.live);
  p.skip = static_cast<float>(skip);
  p.activation = activation_named(activation);
  p.dropout = dropout(seed, dropout_p);
  p.number = number_of(like);
  return p;
}

int64_t vectors_size(const Adapter& p) {
  return rounded_up(p.width, kMostPanel) + 4 * rounded_up(p.channels, kMostPanel);
}
int64_t weight_size(const Adapter& p) { return rounded_up(p.width, kMostPanel) * rounded_up(p.channels, kMostPanel); }

/// Floats of a tile of rows with so many columns of the tensors.
int64_t block_size(const Adapter& p, int64_t columns) {
  return with_guard(p.turned ? tile_size(columns, kMostRows) : tile_size(kMostRows, columns));
}

/// Floats of a tile of x's rows, where the kernels cannot read them in place.
int64_t copied(const Adapter& p, const Rows& x, const Samples& samples) {
  const bool in_place = readable_in_place(x, p.turned) && samples.live.size() == 1;
  return in_place ? 0 : block_size(p, p.channels);
}

/// Floats that a block of rows takes: x's rows, `middles` of the middle and dropout's factors, `columns` tiles of what
/// is finished together, and the samples' factors.
int64_t own_tiles(const Adapter& p, const Rows& x, const Samples& samples, int64_t middles, int64_t columns) {
  middles += p.dropout.seed != nullptr;
  return copied(p, x, samples) + middles * with_guard(tile_size(kMostRows, p.width)) +
         columns * block_size(p, p.turned ? kMostPanel : kMostColumns) +
         p.turned * with_guard(tile_size(p.width, kMostRows)) + with_guard(kMostRows);
}

void pack(const AdapterKernels& kernels, const Adapter& p, void (*part)(const Adapter&, int64_t)) {
  const int64_t panels = ratio_up(std::max(p.width, p.channels), kernels.panel);
  in_parallel(panels, p.width * p.channels, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t panel = begin; panel < end; ++panel) part(p, panel);
  });
}

/// Dropped rows of `to` <- those of `from`, or zeros where it has no data.
void copy_dropped(const AdapterKernels& kernels, const Samples& samples, const Rows& from, const Rows& to,
                  int64_t channels, const Tensor& like) {
  if (samples.dropped.empty()) return;
  const Live rows = samples.of(samples.dropped);
  const Tensor scratch = empty({with_guard(tile_size(kMostRows, channels))}, Number::kFloat32, like);
  float* tile = mutable_data<float>(scratch);
  for (int64_t first = 0; first < samples.dropped_rows; first += kMostRows) {
    kernels.copy(from, to, rows, first, std::min(kMostRows, samples.dropped_rows - first), channels, tile);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> adapter_residual_fwd(const Tensor& z, const Tensor& down_weight,
                                                const OptionalTensor& down_bias, const Tensor& up_weight,
                                                const OptionalTensor& up_bias, const OptionalTensor& residual,
                                                const OptionalTensor& layer_scale, const OptionalTensor& sample_scale,
                                                const OptionalTensor& seed, double skip, const std::string& activation,
                                                double dropout_p, bool channels_first, bool, bool save) {
  const AdapterKernels& kernels = adapter_kernels();
  const int64_t batch = z.size(0), length = z.size(1), channels = z.size(2), width = down_weight.size(0);
  Tensor y = rows_like(residual ? *residual : z, channels, channels_first);
  Tensor hidden = save ? empty({batch * length, width}, number_of(z), z) : nothing(number_of(z), z);
  if (batch * length == 0) return {y, hidden};
  const OptionalTensor gamma = held(layer_scale), scale = float32(sample_scale);
  const Samples samples(batch, length, scale ? const_data<float>(*scale) : nullptr, scale ? scale->numel() : 1);
  AdapterForward p{adapter_of(z, down_weight, down_bias, up_weight, up_bias, gamma, scale, seed, samples,
                              batch * length, skip, activation, dropout_p)};
  p.z = const_rows(z);
  p.residual = residual ? const_rows(*residual) : p.z;
  p.y = mutable_rows(y);
  p.turned = by_positions(p.z) && by_positions(p.residual) && by_positions(p.y);
  if (save) p.hidden = by_rows(mutable_rows(hidden), length);
  copy_dropped(kernels, samples, p.residual, p.y, channels, z);
  if (save) copy_dropped(kernels, samples, Rows(), p.hidden, width, z);
  if (samples.rows == 0) return {y, hidden};

  const RowTasks tasks(samples.rows, samples.rows * channels * width * 2);
  Floats floats;
  const Floats::Part vectors = floats.reserve(vectors_size(p)), down_t = floats.reserve(weight_size(p));
  const Floats::Part up_t = floats.reserve(weight_size(p));
  const int64_t own = own_tiles(p, p.z, samples, 1, 2);
  const Floats::Part scratch = floats.reserve(tasks.count * own);
  floats.allocate(z);
  p.vectors = floats[vectors];
  p.down_t = floats[down_t];
  p.up_t = floats[up_t];
  float* const each = floats[scratch];
  kernels.prepare(p);
  pack(kernels, p, kernels.pack_forward);
  tasks.run(
      [&](int64_t first, int64_t count, int64_t task) { kernels.forward(p, first, count, each + task * own); });
  return {y, hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adapter_residual_bwd(
    const Tensor& dy, const OptionalTensor& z, const Tensor& down_weight, const OptionalTensor& down_bias,
    const Tensor& up_weight, const OptionalTensor& up_bias, const OptionalTensor& layer_scale,
    const OptionalTensor& sample_scale, const OptionalTensor& hidden, const OptionalTensor& seed, double skip,
    const std::string& activation, double dropout_p, bool channels_first, bool z_is_residual, bool need_dz,
    bool need_down, bool need_up) {
  const AdapterKernels& kernels = adapter_kernels();
  const int64_t batch = dy.size(0), length = dy.size(1), channels = dy.size(2), width = down_weight.size(0);
  const Tensor& like = z ? *z : *hidden;
  const Number number = number_of(like);
  Tensor dz = need_dz ? rows_like(dy, channels, channels_first, number) : nothing(number, like);
  const auto gradient = [&](const OptionalTensor& parameter, bool needed) {
    if (!parameter || !needed) return nothing(number_of(up_weight), up_weight);
    return torch::stable::new_empty(*parameter, parameter->sizes());
  };
  Tensor d_down = gradient(down_weight, need_down), d_down_bias = gradient(down_bias, need_down);
  Tensor d_up = gradient(up_weight, need_up), d_up_bias = gradient(up_bias, need_up);
  Tensor d_gamma = empty({need_up ? channels : 0}, Number::kFloat32, dy);
  const auto without_rows = [&] {
    for (Tensor* sum : {&d_down, &d_down_bias, &d_up, &d_up_bias, &d_gamma}) torch::stable::zero_(*sum);
    return std::make_tuple(dz, d_down, d_down_bias, d_up, d_up_bias, d_gamma);
  };
  if (batch * length == 0) return without_rows();
  const OptionalTensor gamma = held(layer_scale), scale = float32(sample_scale);
  const Samples samples(batch, length, scale ? const_data<float>(*scale) : nullptr, scale ? scale->numel() : 1);
  AdapterBackwardRows p{adapter_of(like, down_weight, down_bias, up_weight, up_bias, gamma, scale, seed, samples,
                                   batch * length, skip, activation, dropout_p)};
  if (need_dz) p.dz = mutable_rows(dz);
  p.dy = const_rows(dy);
  p.z_is_residual = z_is_residual;
  if (need_dz) copy_dropped(kernels, samples, z_is_residual ? p.dy : Rows(), p.dz, channels, dy);
  if (samples.rows == 0) return without_rows();
  if (hidden) {
    p.hidden = by_rows(const_rows(*hidden), length);
  } else {
    p.z = const_rows(*z);
  }
  const bool turned_z = !z || by_positions(const_rows(*z));
  p.turned = by_positions(p.dy) && (!need_dz || by_positions(p.dz)) && (hidden || turned_z);

  const int64_t work = samples.rows * channels * width * 2;
  const RowTasks rows_tasks(samples.rows, work);
  // Few panels of many rows: parts of the rows give every thread its share.
  const int64_t panels = ratio_up(channels, kernels.panel);
  const int64_t parts = std::clamp<int64_t>(std::min(32 / panels, samples.rows / 1024), 1, 32);
  const Tasks sums_tasks(parts * panels, work);
  p.pitch = rounded_up(width, 16);
  // Dropout's mask takes longer to draw again than a to read.
  const bool again = hidden && !seed;
  const int64_t weights = weight_size(p) * (1 + need_dz + !hidden);
  const int64_t part_size = (2 * p.pitch + 2) * rounded_up(channels, kMostPanel) + rounded_up(width, kMostPanel);
  const bool sums_wanted = need_down || need_up;
  Floats floats;
  const Floats::Part vectors = floats.reserve(vectors_size(p));
  // The sums come after the last product with a weight, and lie where the weights did.
  const Floats::Part weights_then_sums = floats.reserve(std::max(weights, sums_wanted ? parts * part_size : 0));
  const Floats::Part dh = floats.reserve(samples.rows * p.pitch, need_down);
  const Floats::Part activated = floats.reserve(samples.rows * p.pitch, need_up && !again);
  const int64_t height = std::min(width, kMostHeight);
  const int64_t own_rows = own_tiles(p, p.dy, samples, need_down ? 1 : 2, 1) + (hidden ? 0 : copied(p, p.z, samples));
  const int64_t own_sums = 2 * with_guard(tile_size(kChunk, kSumsColumns)) + 2 * with_guard(kSumsColumns) +
                           with_guard(kChunk) + 2 * with_guard(kChunk * (height + kMostPackedRows)) +
                           (again ? with_guard(tile_size(kChunk, height)) : 0);
  const int64_t own_finish = 2 * with_guard(width * kMostPanel) + 2 * with_guard(kMostPanel);
  const int64_t own = std::max({own_rows, own_sums, own_finish});
  const Floats::Part scratch = floats.reserve(std::max(rows_tasks.count, sums_tasks.count) * own);
  floats.allocate(dy);
  p.vectors = floats[vectors];
  float* weight = floats[weights_then_sums];
  for (float** packed : {&p.gated_up, need_dz ? &p.plain_down : nullptr, hidden ? nullptr : &p.down_t}) {
    if (!packed) continue;
    *packed = weight;
    weight += weight_size(p);
  }
  p.dh = floats[dh];
  p.activated = floats[activated];
  float* const each = floats[scratch];
  kernels.prepare(p);
  // Sums with a alone, which is made again there, have no use for dh.
  if (need_dz || need_down || !again) {
    pack(kernels, p, kernels.pack_backward);
    if (!hidden) pack(kernels, p, kernels.pack_forward);
    rows_tasks.run([&](int64_t first, int64_t count, int64_t task) {
      kernels.backward_rows(p, first, count, each + task * own);
    });
  }
  if (!need_down && !need_up) return {dz, d_down, d_down_bias, d_up, d_up_bias, d_gamma};

  AdapterSums s{static_cast<const Adapter&>(p)};
  s.z = z && (need_down || skip != 0.0) ? const_rows(*z) : Rows();
  s.dy = p.dy;
  s.turned = by_positions(s.dy) && turned_z;
  s.dh = p.dh;
  s.activated = p.activated;
  s.pitch = p.pitch;
  s.rows = samples.rows;
  s.parts = parts;
  s.sums = floats[weights_then_sums];
  if (again) s.hidden = p.hidden;
  if (need_down && z) s.d_down = mutable_rows(d_down);
  // Without z the gradient of d alone is wanted.
  if (need_down && !z) torch::stable::zero_(d_down);
  if (need_up) s.d_up = mutable_rows(d_up);
  s.d_down_bias = written(d_down_bias);
  s.d_up_bias = written(d_up_bias);
  s.d_gamma = need_up ? mutable_data<float>(d_gamma) : nullptr;
  sums_tasks.run([&](int64_t begin, int64_t end, int64_t task) {
    for (int64_t unit = begin; unit < end;) {
      const int64_t part = unit / panels, last = std::min(end, (part + 1) * panels);
      kernels.add_panels(s, part, unit % panels, last - part * panels, each + task * own);
      unit = last;
    }
  });
  if (s.d_down_bias.data) {
    for (int64_t part = 0; part < parts; ++part) kernels.add_down_bias(s, part);
    kernels.finish_down_bias(s);
  }
  in_parallel(panels, 2 * parts * width * channels, [&](int64_t begin, int64_t end, int64_t task) {
    for (int64_t panel = begin; panel < end; ++panel) kernels.finish(s, panel, each + task * own);
  });
  return {dz, d_down, d_down_bias, d_up, d_up_bias, d_gamma};
}

}  // namespace pyfused
