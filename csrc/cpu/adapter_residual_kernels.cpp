// The kernels of adapter_residual, compiled once for each instruction set: see simd.h.
#include "adapter_residual.h"

#include "activate.h"
#include "philox.h"
#include "products.h"
#include "simd.h"
#include "tiles.h"

namespace pyfused {
namespace {

struct Vectors {
  float *down_bias, *up_bias, *gate, *gamma, *plain_up_bias;
};
Vectors vectors_of(const Adapter& p) {
  const int64_t width = rounded_up(p.width, kMostPanel), channels = rounded_up(p.channels, kMostPanel);
  float* first = p.vectors;
  return {first, first + width, first + width + channels, first + width + 2 * channels, first + width + 3 * channels};
}

/// A tile as a 16-bit type holds it.
void round_tile(Number number, int64_t rows, int64_t columns, Tile tile) {
  with_number(number, [&](auto constant) INLINE_LAMBDA {
    typedef Elements<decltype(constant)::value> As;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; c += kLanes) {
        typename As::Element narrow[kLanes];
        float* there = tile.data + r * tile.pitch + c;
        As::store(narrow, load(there));
        store(there, As::load(narrow));
      }
  });
}

/// Part of a weight in float32, rounded as the products want it.
void load_weight(const Rows& weight, Number number, int64_t rows, int64_t column, int64_t columns, Tile tile) {
  const Span all{0, 0, rows};
  load_tile(weight, whole(all), 0, rows, column, columns, tile);
  if (number != Number::kFloat32 && number != weight.number) round_tile(number, rows, columns, tile);
}

void load_vector(const Vector& vector, Number number, int64_t count, float* out) {
  load_weight({vector.data, vector.number, 0, 0, vector.stride}, number, 1, 0, count, {out, 0});
}

void prepare(const Adapter& p) {
  const Vectors v = vectors_of(p);
  const int64_t channels = rounded_up(p.channels, kMostPanel), width = rounded_up(p.width, kMostPanel);
  for (int64_t i = 0; i < width; ++i) v.down_bias[i] = 0.0f;
  for (int64_t c = 0; c < channels; ++c) v.plain_up_bias[c] = 0.0f, v.gamma[c] = 1.0f;
  if (p.down_bias.data) load_vector(p.down_bias, p.number, p.width, v.down_bias);
  if (p.up_bias.data) load_vector(p.up_bias, p.number, p.channels, v.plain_up_bias);
  if (p.gamma.data) load_vector(p.gamma, Number::kFloat32, p.channels, v.gamma);
  for (int64_t c = 0; c < channels; ++c) {
    v.gate[c] = p.skip * v.gamma[c];
    v.up_bias[c] = v.gamma[c] * v.plain_up_bias[c];
  }
}

/// A panel of a weight (depth, columns), with a factor for each row or each column where there is one.
void pack_panel(const Rows& weight, Number number, int64_t depth, int64_t columns, int64_t panel, const float* by_row,
                const float* by_column, float* packed) {
  const int64_t column = panel * kPanel, some = least(kPanel, columns - column), pitch = rounded_up(some, kLanes);
  if (some <= 0) return;
  const Tile tile{packed + column * depth, pitch};
  load_weight(weight, number, depth, column, some, tile);
  if (!by_row && !by_column) return;
  for (int64_t r = 0; r < depth; ++r)
    for (int64_t c = 0; c < some; c += kLanes) {
      float* there = tile.data + r * pitch + c;
      store(there, load(there) * (by_row ? splat(by_row[r]) : load(by_column + column + c)));
    }
}

void pack_forward(const Adapter& p, int64_t panel) {
  if (p.down_t) pack_panel(transposed(p.down), p.number, p.channels, p.width, panel, nullptr, nullptr, p.down_t);
  if (p.up_t) pack_panel(transposed(p.up), p.number, p.width, p.channels, panel, nullptr, vectors_of(p).gamma, p.up_t);
}

void pack_backward(const Adapter& p, int64_t panel) {
  if (p.gated_up) pack_panel(p.up, p.number, p.channels, p.width, panel, vectors_of(p).gamma, nullptr, p.gated_up);
  if (p.plain_down) pack_panel(p.down, p.number, p.width, p.channels, panel, nullptr, nullptr, p.plain_down);
}

/// Rows of a tile of the tensors, turned or not, as a product reads them from the left.
template <bool kTurned>
INLINE Left rows_of_tile(Tile tile) {
  return kTurned ? Left{tile.data, 1, tile.pitch, kRows, kMostRows} : rows_of(tile.data, tile.pitch);
}

/// out (rows, columns `begin` to `end` of the matrix) = left times a packed matrix (depth, columns).
///
/// Every panel meets a part of the depth before the next part comes: those columns of `left` stay in a cache.
void multiply(int64_t rows, Left left, const float* packed, int64_t depth, int64_t columns, int64_t begin, int64_t end,
              Tile out) {
  for (int64_t start = 0; start < depth; start += kChain) {
    for (int64_t column = begin; column < end; column += kPanel) {
      const int64_t some = least(kPanel, columns - column), pitch = rounded_up(some, kLanes);
      product(rows, some, least(kChain, depth - start), left, packed + column * depth + start * pitch, pitch,
              out.data + column - begin, out.pitch, start > 0);
    }
    left.data += kChain * left.step;
  }
}

/// Factors k of the samples that these rows belong to.
void load_scales(const Adapter& p, int64_t first, int64_t count, float* k) {
  pieces(p.live, first, count, [&](int64_t image, int64_t position, int64_t some, int64_t at) INLINE_LAMBDA {
    const int64_t row = image * p.live.length + position;
    for (int64_t r = 0; r < some; ++r) k[at + r] = p.sample_scale ? p.sample_scale[(row + r) / p.per_sample] : 1.0f;
  });
}

void load_mask(const Adapter& p, int64_t first, int64_t count, Tile mask) {
  pieces(p.live, first, count, [&](int64_t image, int64_t position, int64_t some, int64_t at) INLINE_LAMBDA {
    const int64_t row = image * p.live.length + position;
    for (int64_t r = 0; r < some; ++r) {
      dropout_factors(p.dropout, row + r, p.width, mask.data + (at + r) * mask.pitch);
    }
  });
}

/// Dropout's factors of these rows; without data where there are none.
Tile mask_of(const Adapter& p, int64_t first, int64_t count, Scratch& scratch) {
  if (!p.dropout.seed) return {};
  const Tile mask = scratch.tile(kMostRows, p.width);
  load_mask(p, first, count, mask);
  return mask;
}

/// Room for `rows` rows of `columns` channels.
template <bool kTurned>
INLINE Tile tile_for(int64_t rows, int64_t columns, Scratch& scratch) {
  return kTurned ? scratch.tile(columns, rows) : scratch.tile(rows, columns);
}

/// These rows, where they lie or else in a tile of their own.
template <bool kTurned>
Tile block_of(const Rows& x, const Adapter& p, int64_t first, int64_t count, Scratch& scratch) {
  Tile tile = in_place<kTurned>(x, p.live, first, count);
  if (tile.data && readable_in_place(x, kTurned)) return tile;
  tile = tile_for<kTurned>(kMostRows, p.channels, scratch);
  load_tile<kTurned>(x, p.live, first, count, 0, p.channels, tile);
  return tile;
}

/// h before the activation: z D^T + d.
void load_hidden(const Adapter& p, const Vectors& v, int64_t count, Left z, Tile h) {
  multiply(count, z, p.down_t, p.channels, p.width, 0, p.width, h);
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = 0; c < p.width; c += kLanes) {
      float* there = h.data + r * h.pitch + c;
      store(there, load(there) + load(v.down_bias + c));
    }
}

/// Rows of `to` <- those of `from`, or zeros where it has no data.
void copy(const Rows& from, const Rows& to, const Live& live, int64_t first, int64_t count, int64_t columns,
          float* memory) {
  const Tile tile = Scratch{memory}.tile(count, columns);
  if (from.data) {
    load_tile(from, live, first, count, 0, columns, tile);
  } else {
    std::memset(tile.data, 0, count * tile.pitch * sizeof(float));
  }
  store_tile(to, live, first, count, 0, columns, tile);
}

/// Channels of a block whose products are finished together: long pieces of rows, or a panel of turned ones.
template <bool kTurned>
constexpr int64_t kFinished = kTurned ? kPanel : kMostColumns;

/// Products of a block (rows, width) with a packed matrix (width, channels), some channels at a time:
/// end(channel, channels, tile). Where the tensors are turned so is the tile, and the packed matrix is the left factor.
template <bool kTurned, class End>
INLINE void for_channels(const Adapter& p, int64_t count, Tile left, const float* packed, Scratch& scratch, End&& end) {
  const Tile tile = tile_for<kTurned>(kMostRows, kFinished<kTurned>, scratch);
  Tile turned{};
  if constexpr (kTurned) {
    turned = scratch.tile(p.width, kMostRows);
    turn(count, p.width, left, turned);
  }
  for (int64_t first = 0; first < p.channels; first += kFinished<kTurned>) {
    const int64_t columns = least(kFinished<kTurned>, p.channels - first);
    if constexpr (kTurned) {
      const Left channels{packed + first * p.width, 1, rounded_up(columns, kLanes), kRows, 0};
      for (int64_t r = 0; r < count; r += kPanel) {
        product(columns, least(kPanel, count - r), p.width, channels, turned.data + r, turned.pitch, tile.data + r,
                tile.pitch, false);
      }
    } else {
      multiply(count, rows_of(left.data, left.pitch), packed, p.width, p.channels, first, first + columns, tile);
    }
    end(first, columns, tile);
  }
}

/// What there is for each channel, or for each row of the tensors, at the vector that begins at a tile's (r, c).
template <bool kTurned>
INLINE Vec of_channels(const float* channels, int64_t r, int64_t c) {
  return kTurned ? splat(channels[r]) : load(channels + c);
}
template <bool kTurned>
INLINE Vec of_rows(const float* rows, int64_t r, int64_t c) {
  return kTurned ? load(rows + c) : splat(rows[r]);
}
/// Calls body(r, c, columns) for every vector of a tile, the last of which may have fewer columns than lanes.
template <bool kTurned, class Body>
INLINE void for_vectors(int64_t count, int64_t channels, Body&& body) {
  const int64_t rows = kTurned ? channels : count, columns = kTurned ? count : channels;
  const int64_t wholes = columns / kLanes * kLanes;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < wholes; c += kLanes) body(r, c, int64_t{kLanes});
    if (wholes < columns) body(r, wholes, columns - wholes);
  }
}

INLINE float* element(Tile tile, int64_t r, int64_t c) { return tile.data + r * tile.pitch + c; }

template <bool kTurned>
void forward_block(const AdapterForward& p, int64_t first, int64_t count, float* memory) {
  constexpr Number kFloat32 = Number::kFloat32;
  Scratch scratch{memory};
  const Vectors v = vectors_of(p);
  const Tile a = scratch.tile(kMostRows, p.width), mask = mask_of(p, first, count, scratch);
  float* k = scratch.take(kMostRows);
  const Tile z = block_of<kTurned>(p.z, p, first, count, scratch);
  load_hidden(p, v, count, rows_of_tile<kTurned>(z), a);
  if (p.hidden.data) store_tile(p.hidden, p.live, first, count, 0, p.width, a);
  activate(p.activation, count, p.width, a, nullptr, a);
  if (mask.data) {
    for_vectors<false>(count, p.width, [&](int64_t r, int64_t c, int64_t) INLINE_LAMBDA {
      store(element(a, r, c), load(element(a, r, c)) * load(element(mask, r, c)));
    });
  }
  load_scales(p, first, count, k);
  const Tile other = tile_for<kTurned>(kMostRows, kFinished<kTurned>, scratch);
  const Tile residual = in_place<kTurned>(p.residual, p.live, first, count);
  const Tile y = in_place<kTurned>(p.y, p.live, first, count);
  for_channels<kTurned>(p, count, a, p.up_t, scratch, [&](int64_t column, int64_t columns, Tile tile) INLINE_LAMBDA {
    const Tile plus = residual.data ? from_column<kTurned>(residual, column) : other;
    const Tile out = y.data ? from_column<kTurned>(y, column) : tile, skipped = from_column<kTurned>(z, column);
    if (!residual.data) load_tile<kTurned>(p.residual, p.live, first, count, column, columns, plus);
    const float *bias = v.up_bias + column, *gate = v.gate + column;
    for_vectors<kTurned>(count, columns, [&](int64_t r, int64_t c, int64_t some) INLINE_LAMBDA {
      Vec branch = load(element(tile, r, c)) + of_channels<kTurned>(bias, r, c);
      branch += of_channels<kTurned>(gate, r, c) * load_some<kFloat32>(element(skipped, r, c), some);
      const Vec from = load_some<kFloat32>(element(plus, r, c), some);
      store_some<kFloat32>(element(out, r, c), from + of_rows<kTurned>(k, r, c) * branch, some);
    });
    if (!y.data) store_tile<kTurned>(p.y, p.live, first, count, column, columns, tile);
  });
}

void forward(const AdapterForward& p, int64_t first, int64_t count, float* memory) {
  p.turned ? forward_block<true>(p, first, count, memory) : forward_block<false>(p, first, count, memory);
}

template <bool kTurned>
void backward_block(const AdapterBackwardRows& p, int64_t first, int64_t count, float* memory) {
  constexpr Number kFloat32 = Number::kFloat32;
  Scratch scratch{memory};
  const Vectors v = vectors_of(p);
  const Tile h = scratch.tile(kMostRows, p.width), mask = mask_of(p, first, count, scratch);
  float* k = scratch.take(kMostRows);
  // Sums over all rows read them later, dz now.
  const Tile dh = p.dh ? Tile{p.dh + first * p.pitch, p.pitch} : scratch.tile(kMostRows, p.width);
  const Tile a = p.activated ? Tile{p.activated + first * p.pitch, p.pitch} : Tile{};
  const Tile dy = block_of<kTurned>(p.dy, p, first, count, scratch);
  load_scales(p, first, count, k);
  multiply(count, rows_of_tile<kTurned>(dy), p.gated_up, p.channels, p.width, 0, p.width, dh);
  if (p.hidden.data) {
    load_tile(p.hidden, p.live, first, count, 0, p.width, h);
  } else {
    const Tile z = block_of<kTurned>(p.z, p, first, count, scratch);
    load_hidden(p, v, count, rows_of_tile<kTurned>(z), h);
  }
  differentiate(p.activation, count, p.width, h, mask, k, dh, a);
  if (!p.dz.data) return;
  const Tile dz = in_place<kTurned>(p.dz, p.live, first, count);
  const Vec one = splat(p.z_is_residual ? 1.0f : 0.0f);
  for_channels<kTurned>(p, count, dh, p.plain_down, scratch, [&](int64_t column, int64_t columns, Tile tile)
                                                                  INLINE_LAMBDA {
    const Tile out = dz.data ? from_column<kTurned>(dz, column) : tile, skipped = from_column<kTurned>(dy, column);
    const float* gate = v.gate + column;
    for_vectors<kTurned>(count, columns, [&](int64_t r, int64_t c, int64_t some) INLINE_LAMBDA {
      const Vec factor = one + of_rows<kTurned>(k, r, c) * of_channels<kTurned>(gate, r, c);
      const Vec from = load_some<kFloat32>(element(skipped, r, c), some);
      store_some<kFloat32>(element(out, r, c), load(element(tile, r, c)) + factor * from, some);
    });
    if (!dz.data) store_tile<kTurned>(p.dz, p.live, first, count, column, columns, tile);
  });
}

void backward_rows(const AdapterBackwardRows& p, int64_t first, int64_t count, float* memory) {
  p.turned ? backward_block<true>(p, first, count, memory) : backward_block<false>(p, first, count, memory);
}

/// Sums of a panel in one part of the rows.
struct PanelSums {
  float *down, *up, *dy, *dy_z;
};
INLINE int64_t sums_of_part(const AdapterSums& p) { return (2 * p.pitch + 2) * rounded_up(p.channels, kMostPanel); }
INLINE PanelSums sums_of(const AdapterSums& p, int64_t part, int64_t column, int64_t columns) {
  float* down = p.sums + part * sums_of_part(p) + (2 * p.pitch + 2) * column;
  float* up = down + p.pitch * columns;
  return {down, up, up + p.pitch * columns, up + (p.pitch + 1) * columns};
}

INLINE int64_t first_of_part(const AdapterSums& p, int64_t part) {
  const int64_t chunks = (p.rows + kChunk - 1) / kChunk;
  return least(p.rows, chunks * part / p.parts * kChunk);
}

/// Sums over `count` rows of k dy, and of k dy z where there is z.
void add_channels(int64_t count, int64_t columns, Tile dy, Tile z, const float* k, float* total, float* with) {
  constexpr int64_t kTogether = 4;
  for (int64_t r = 0; r < count; r += kTogether) {
    const int64_t rows = least(kTogether, count - r);
    for (int64_t c = 0; c < columns; c += kLanes) {
      Vec sum = load(total + c), product = z.data ? load(with + c) : Vec{};
      for (int64_t i = 0; i < rows; ++i) {
        const Vec g = splat(k[r + i]) * load(dy.data + (r + i) * dy.pitch + c);
        sum += g;
        if (z.data) product += g * load(z.data + (r + i) * z.pitch + c);
      }
      store(total + c, sum);
      if (z.data) store(with + c, product);
    }
  }
}

/// Rows of the middle, k a, from the first of its columns `top` on.
Tile activated_of(const AdapterSums& p, int64_t start, int64_t count, int64_t top, int64_t columns, const float* k,
                  Tile h) {
  if (p.activated) return {p.activated + start * p.pitch + top, p.pitch};
  load_tile(p.hidden, p.live, start, count, top, columns, h);
  activate(p.activation, count, columns, h, k, h);
  return h;
}

/// Calls body(start, count, top, columns, adds) for every chunk of a part's rows and, of the middle, columns from `top`
/// on, with the rows' factors in k; `adds` says whether a chunk came before.
template <class Body>
INLINE void for_chunks(const AdapterSums& p, int64_t part, float* k, Body&& body) {
  const int64_t first = first_of_part(p, part), last = first_of_part(p, part + 1);
  for (int64_t start = first; start < last; start += kChunk) {
    const int64_t count = least(kChunk, last - start);
    load_scales(p, start, count, k);
    for (int64_t top = 0; top < p.width; top += kMostHeight) {
      body(start, count, top, least(kMostHeight, p.width - top), start > first);
    }
  }
}

void add_rows(const AdapterSums& p, int64_t part, int64_t begin, int64_t end, float* memory) {
  Scratch scratch{memory};
  const int64_t from = begin * kPanel, until = least(p.channels, end * kPanel);
  const int64_t height = least(kMostHeight, p.width);
  const Tile z_tile = scratch.tile(kChunk, kSumsColumns), dy = scratch.tile(kChunk, kSumsColumns);
  float *total = scratch.take(kSumsColumns), *with = scratch.take(kSumsColumns);
  float *k = scratch.take(kChunk), *packed_dh = scratch.take(packed_size(kChunk, height));
  float* packed_a = scratch.take(packed_size(kChunk, height));
  const Tile h = p.activated ? Tile{} : scratch.tile(kChunk, height);
  const Tile z = p.z.data ? z_tile : Tile{};
  for_chunks(p, part, k, [&](int64_t start, int64_t count, int64_t top, int64_t rows, bool adds) INLINE_LAMBDA {
    Left dh{}, a{};
    if (p.d_down.data) dh = pack_transposed(p.dh + start * p.pitch + top, p.pitch, count, rows, packed_dh);
    if (p.d_up.data) {
      const Tile middle = activated_of(p, start, count, top, rows, k, h);
      a = pack_transposed(middle.data, middle.pitch, count, rows, packed_a);
    }
    for (int64_t column = from; column < until; column += kSumsColumns) {
      const int64_t columns = least(kSumsColumns, until - column);
      if (z.data) load_tile(p.z, p.live, start, count, column, columns, z);
      if (p.d_up.data) load_tile(p.dy, p.live, start, count, column, columns, dy);
      if (top == 0 && p.d_up.data) {
        for (int64_t c = 0; c < columns; c += kLanes) store(total + c, Vec{}), store(with + c, Vec{});
        add_channels(count, columns, dy, z, k, total, with);
      }
      for (int64_t c = 0; c < columns; c += kPanel) {
        const int64_t some = least(kPanel, columns - c), padded = rounded_up(some, kLanes);
        const PanelSums sums = sums_of(p, part, column + c, padded);
        if (p.d_down.data) {
          product(rows, some, count, dh, z.data + c, z.pitch, sums.down + top * padded, padded, adds);
        }
        if (!p.d_up.data) continue;
        product(rows, some, count, a, dy.data + c, dy.pitch, sums.up + top * padded, padded, adds);
        for (int64_t j = 0; j < some && top == 0; j += kLanes) {
          store(sums.dy + j, adds ? load(sums.dy + j) + load(total + c + j) : load(total + c + j));
          store(sums.dy_z + j, adds ? load(sums.dy_z + j) + load(with + c + j) : load(with + c + j));
        }
      }
    }
  });
}

/// Turned channels of these rows, where they lie or else in the tile.
INLINE Tile turned_channels(const Rows& x, const Live& live, int64_t first, int64_t count, int64_t column,
                            int64_t columns, Tile tile) {
  const Tile there = in_place<true>(x, live, first, count);
  if (there.data && readable_in_place(x, true)) return from_column<true>(there, column);
  load_tile<true>(x, live, first, count, column, columns, tile);
  return tile;
}

/// out (channels, columns) = or += turned x (channels, rows) times the middle (rows, columns).
INLINE void add_turned(int64_t channels, int64_t columns, int64_t rows, Tile x, Tile middle, Tile out, bool adds) {
  for (int64_t c = 0; c < columns; c += kPanel) {
    product(channels, least(kPanel, columns - c), rows, rows_of(x.data, x.pitch), middle.data + c, middle.pitch,
            out.data + c, out.pitch, adds);
  }
}

void add_turned_rows(const AdapterSums& p, int64_t part, int64_t begin, int64_t end, float* memory) {
  Scratch scratch{memory};
  const Tile z_tile = scratch.tile(kPanel, kChunk), dy_tile = scratch.tile(kPanel, kChunk);
  float* k = scratch.take(kChunk);
  const Tile h = p.activated ? Tile{} : scratch.tile(kChunk, least(kMostHeight, p.width));
  for_chunks(p, part, k, [&](int64_t start, int64_t count, int64_t top, int64_t columns, bool adds) INLINE_LAMBDA {
    const Tile dh = p.d_down.data ? Tile{p.dh + start * p.pitch + top, p.pitch} : Tile{};
    const Tile a = p.d_up.data ? activated_of(p, start, count, top, columns, k, h) : Tile{};
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t column = panel * kPanel, some = least(kPanel, p.channels - column);
      const PanelSums sums = sums_of(p, part, column, rounded_up(some, kLanes));
      Tile z{}, dy{};
      if (p.z.data) z = turned_channels(p.z, p.live, start, count, column, some, z_tile);
      if (p.d_up.data) dy = turned_channels(p.dy, p.live, start, count, column, some, dy_tile);
      if (p.d_down.data) add_turned(some, columns, count, z, dh, {sums.down + top, p.pitch}, adds);
      if (!p.d_up.data) continue;
      add_turned(some, columns, count, dy, a, {sums.up + top, p.pitch}, adds);
      for (int64_t c = 0; c < some && top == 0; ++c) {
        Vec total = {}, with = {};
        for (int64_t r = 0; r < count; r += kLanes) {
          const int64_t rows = least(kLanes, count - r);
          const Vec g = load_some<Number::kFloat32>(k + r, rows) * load_some<Number::kFloat32>(element(dy, c, r), rows);
          total += g;
          if (z.data) with += g * load_some<Number::kFloat32>(element(z, c, r), rows);
        }
        sums.dy[c] = adds ? sums.dy[c] + sum(total) : sum(total);
        sums.dy_z[c] = adds ? sums.dy_z[c] + sum(with) : sum(with);
      }
    }
  });
}

void add_panels(const AdapterSums& p, int64_t part, int64_t begin, int64_t end, float* memory) {
  p.turned ? add_turned_rows(p, part, begin, end, memory) : add_rows(p, part, begin, end, memory);
}

INLINE float* down_bias_of(const AdapterSums& p, int64_t part) {
  return p.sums + p.parts * sums_of_part(p) + part * rounded_up(p.width, kMostPanel);
}

void add_down_bias(const AdapterSums& p, int64_t part) {
  const int64_t first = first_of_part(p, part), last = first_of_part(p, part + 1);
  float* sums = down_bias_of(p, part);
  for (int64_t start = first; start < last; start += kChunk)
    for (int64_t c = 0; c < p.width; c += kLanes) {
      Vec total = {};
      for (int64_t r = start; r < least(start + kChunk, last); ++r) total += load(p.dh + r * p.pitch + c);
      store(sums + c, start > first ? load(sums + c) + total : total);
    }
}

/// first[i] += what the other parts have there.
INLINE void add_parts(float* first, int64_t parts, int64_t apart, int64_t count) {
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < count; i += kLanes) store(first + i, load(first + i) + load(first + part * apart + i));
}

void finish(const AdapterSums& p, int64_t panel, float* memory) {
  Scratch scratch{memory};
  const Vectors v = vectors_of(p);
  const int64_t column = panel * kPanel, some = least(kPanel, p.channels - column), padded = rounded_up(some, kLanes);
  const PanelSums sums = sums_of(p, 0, column, padded);
  const int64_t numbers = (p.turned ? p.pitch : p.width) * padded, apart = sums_of_part(p);
  const Span all{0, 0, p.width};
  const Tile up{scratch.take(p.width * kPanel), padded}, turned{scratch.take(p.width * kPanel), padded};
  // (width, channels) of these sums, until the next call; of turned tiles they lie the other way round.
  const auto by_channels = [&](float* total) -> Tile {
    if (!p.turned) return {total, padded};
    turn(some, p.width, {total, p.pitch}, turned);
    return turned;
  };
  if (p.d_down.data) {
    add_parts(sums.down, p.parts, apart, numbers);
    store_tile(p.d_down, whole(all), 0, p.width, column, some, by_channels(sums.down));
  }
  if (!p.d_up.data) return;
  add_parts(sums.up, p.parts, apart, numbers);
  add_parts(sums.dy, p.parts, apart, 2 * padded);
  const Tile total = by_channels(sums.up);
  load_weight(transposed(p.up), p.number, p.width, column, some, up);
  float *d_bias = scratch.take(kPanel), *d_gamma = scratch.take(kPanel);
  for (int64_t c = 0; c < some; c += kLanes) {
    const Vec gamma = load(v.gamma + column + c), dy = load(sums.dy + c);
    Vec dot = {};
    for (int64_t i = 0; i < p.width; ++i) {
      float* there = element(total, i, c);
      dot += load(there) * load(element(up, i, c));
      store(there, load(there) * gamma);
    }
    store(d_bias + c, gamma * dy);
    // Without z there is no skip.
    const Vec skipped = p.z.data && p.skip != 0.0f ? splat(p.skip) * load(sums.dy_z + c) : Vec{};
    store(d_gamma + c, skipped + dot + load(v.plain_up_bias + column + c) * dy);
  }
  store_tile(transposed(p.d_up), whole(all), 0, p.width, column, some, total);
  const Span one{0, 0, 1};
  if (p.d_up_bias.data) {
    store_tile({p.d_up_bias.data, p.d_up_bias.number, 0, 0, 1}, whole(one), 0, 1, column, some, {d_bias, 0});
  }
  store_tile({p.d_gamma, Number::kFloat32, 0, 0, 1}, whole(one), 0, 1, column, some, {d_gamma, 0});
}

void finish_down_bias(const AdapterSums& p) {
  const int64_t apart = rounded_up(p.width, kMostPanel);
  add_parts(down_bias_of(p, 0), p.parts, apart, p.width);
  const Span one{0, 0, 1};
  store_tile({p.d_down_bias.data, p.d_down_bias.number, 0, 0, 1}, whole(one), 0, 1, 0, p.width,
             {down_bias_of(p, 0), 0});
}

}  // namespace

namespace PYFUSED_KERNELS {
extern const AdapterKernels adapter_residual;
const AdapterKernels adapter_residual = {
    kPanel,  prepare,       pack_forward, pack_backward, copy,   forward,
    backward_rows, add_panels, add_down_bias, finish, finish_down_bias,
};
}  // namespace PYFUSED_KERNELS

}  // namespace pyfused
