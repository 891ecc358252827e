// Tiles as the products take them: float32, row-major, from tensors of any strides and numbers.
//
// A tile holds rows and their channels, or it is turned: channels, and of each the positions of images by channels.
#pragma once

#include "rows.h"
#include "simd.h"

namespace pyfused {
namespace {

/// (rows, columns) in float32; row r begins at data + r pitch.
struct Tile {
  float* data;
  int64_t pitch;
};

/// An odd number of 64 bytes: what lies one below the other must not meet in one set of a cache.
INLINE int64_t pitch_of(int64_t columns) {
  const int64_t lines = (columns + 15) / 16;
  return 16 * (lines | 1);
}

/// Memory from the front of what a caller gave.
struct Scratch {
  float* next;

  float* take(int64_t count) {
    float* taken = next;
    next = guarded(taken, count);
    return taken;
  }
  Tile tile(int64_t rows, int64_t columns) {
    const int64_t pitch = pitch_of(columns);
    return {take(rows * pitch), pitch};
  }
};

INLINE Rows transposed(Rows x) {
  const int64_t stride = x.stride_l;
  x.stride_l = x.stride_c;
  x.stride_c = stride;
  return x;
}

/// Calls body(image, position, count, at) for rows first to first + rows of the live ones: `count` rows of an image from
/// a position on, which are rows `at` to at + count of these.
template <class Body>
INLINE void pieces(const Live& live, int64_t first, int64_t rows, Body&& body) {
  int64_t low = 0, high = live.count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (live.spans[middle].at <= first ? low : high) = middle;
  }
  for (int64_t at = 0; at < rows; ++low) {
    const Span& span = live.spans[low];
    const int64_t skipped = first + at - span.at, count = least(rows - at, span.count - skipped);
    body(span.row / live.length, span.row % live.length + skipped, count, at);
    at += count;
  }
}

template <Number kNumber, bool kStores>
INLINE void move_columns(typename Elements<kNumber>::Element* x, const Rows& rows, int64_t count, int64_t columns,
                         float* tile, int64_t pitch) {
  // Channels lie together.
  for (int64_t r = 0; r < count; ++r, x += rows.stride_l, tile += pitch)
    for (int64_t c = 0; c < columns; c += kLanes) {
      if constexpr (kStores) {
        store_some<kNumber>(x + c, load(tile + c), columns - c);
      } else {
        store(tile + c, load_some<kNumber>(x + c, columns - c));
      }
    }
}

template <Number kNumber, bool kStores>
INLINE void move_positions(typename Elements<kNumber>::Element* x, const Rows& rows, int64_t count, int64_t columns,
                           float* tile, int64_t pitch) {
  // Positions lie together: squares change their rows and columns. The last square of a line overlaps the one before.
  const int64_t last_c = most(0, columns - kLanes), last_r = most(0, count - kLanes);
  const int64_t height = least(kLanes, count), width = least(kLanes, columns);
  for (int64_t column = 0; column < columns; column += kLanes)
    for (int64_t row = 0; row < count; row += kLanes) {
      const int64_t c = least(column, last_c), r = least(row, last_r);
      auto* corner = x + c * rows.stride_c + r;
      float* there = tile + r * pitch + c;
      Vec square[kLanes];
      if constexpr (kStores) {
        for (int i = 0; i < kLanes; ++i) square[i] = i < height ? load(there + i * pitch) : Vec{};
        transpose(square);
        if (height == kLanes && width == kLanes) {
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) Elements<kNumber>::store(corner + i * rows.stride_c, square[i]);
        } else {
          for (int i = 0; i < width; ++i) store_some<kNumber>(corner + i * rows.stride_c, square[i], height);
        }
      } else {
        if (height == kLanes && width == kLanes) {
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) square[i] = Elements<kNumber>::load(corner + i * rows.stride_c);
        } else {
          for (int i = 0; i < kLanes; ++i) {
            square[i] = i < width ? load_some<kNumber>(corner + i * rows.stride_c, height) : Vec{};
          }
        }
        transpose(square);
        for (int i = 0; i < height; ++i) store(there + i * pitch, square[i]);
      }
    }
}

template <Number kNumber, bool kStores>
INLINE void move_elements(typename Elements<kNumber>::Element* x, const Rows& rows, int64_t count, int64_t columns,
                          float* tile, int64_t pitch) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      auto* element = x + r * rows.stride_l + c * rows.stride_c;
      if constexpr (kStores) {
        store_some<kNumber>(element, splat(tile[r * pitch + c]), 1);
      } else {
        tile[r * pitch + c] = load_some<kNumber>(element, 1)[0];
      }
    }
}

template <bool kStores, bool kTurned>
void move(const Rows& rows, const Live& live, int64_t first, int64_t count, int64_t column, int64_t columns, Tile tile) {
  with_number(rows.number, [&](auto number) INLINE_LAMBDA {
    constexpr Number kNumber = decltype(number)::value;
    auto* data = static_cast<typename Elements<kNumber>::Element*>(rows.data) + column * rows.stride_c;
    pieces(live, first, count, [&](int64_t image, int64_t position, int64_t some, int64_t at) INLINE_LAMBDA {
      auto* x = data + image * rows.stride_b + position * rows.stride_l;
      if constexpr (kTurned) {
        move_columns<kNumber, kStores>(x, transposed(rows), columns, some, tile.data + at, tile.pitch);
        return;
      }
      float* there = tile.data + at * tile.pitch;
      if (rows.stride_c == 1) {
        move_columns<kNumber, kStores>(x, rows, some, columns, there, tile.pitch);
      } else if (rows.stride_l == 1) {
        move_positions<kNumber, kStores>(x, rows, some, columns, there, tile.pitch);
      } else {
        move_elements<kNumber, kStores>(x, rows, some, columns, there, tile.pitch);
      }
    });
  });
}

/// Columns `column` to column + columns of the live rows from `first` on, into a tile whose rows have room for whole
/// vectors and one more; what is behind the last column is of no meaning.
template <bool kTurned = false>
INLINE void load_tile(const Rows& rows, const Live& live, int64_t first, int64_t count, int64_t column, int64_t columns,
                      Tile tile) {
  move<false, kTurned>(rows, live, first, count, column, columns, tile);
}
template <bool kTurned = false>
INLINE void store_tile(const Rows& rows, const Live& live, int64_t first, int64_t count, int64_t column,
                       int64_t columns, Tile tile) {
  move<true, kTurned>(rows, live, first, count, column, columns, tile);
}

/// A tile (columns, rows) from one of (rows, columns), which lies elsewhere.
INLINE void turn(int64_t rows, int64_t columns, Tile from, Tile to) {
  for (int64_t c = 0; c < columns; c += kLanes)
    for (int64_t r = 0; r < rows; r += kLanes) {
      const int64_t height = least(kLanes, rows - r), width = least(kLanes, columns - c);
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = i < height ? load(from.data + (r + i) * from.pitch + c) : Vec{};
      transpose(square);
      for (int i = 0; i < width; ++i) store(to.data + (c + i) * to.pitch + r, square[i]);
    }
}

/// These rows where they lie, if the products can read them there; data is null where they cannot.
template <bool kTurned = false>
INLINE Tile in_place(const Rows& rows, const Live& live, int64_t first, int64_t count) {
  Tile tile{nullptr, kTurned ? rows.stride_c : rows.stride_l};
  if (rows.number != Number::kFloat32 || (kTurned ? rows.stride_l : rows.stride_c) != 1) return tile;
  pieces(live, first, count, [&](int64_t image, int64_t position, int64_t some, int64_t at) INLINE_LAMBDA {
    if (at == 0 && some == count) {
      tile.data = static_cast<float*>(rows.data) + image * rows.stride_b + position * rows.stride_l;
    }
  });
  return tile;
}

/// From a column of the tensor on.
template <bool kTurned = false>
INLINE Tile from_column(Tile tile, int64_t column) {
  return {tile.data + (kTurned ? column * tile.pitch : column), tile.pitch};
}

/// The matrix (rows, columns) as the only image there is.
INLINE Live whole(const Span& all) { return {&all, 1, all.count}; }

}  // namespace
}  // namespace pyfused
