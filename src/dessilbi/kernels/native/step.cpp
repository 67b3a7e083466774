// SPDX-License-Identifier: Apache-2.0
// One streaming pass over W, gradient, momentum and V that leaves sums of squares of the new V.
//
// A plain C interface: no header of torch, so one build serves every version of it. Threads are
// torch's own; its parallel_for comes in as a function pointer. Every sum has one order, fixed by
// the tiles and not by the threads, and no two threads add to the same number: the same bits on
// any number of threads. kernels/cpu.py declares the same structs; kernels/layout.py explains levels.

#include <atomic>
#include <cfenv>

#include "arithmetic.h"

namespace {

constexpr int MAX_LEVELS = 16;

enum Dtype { F32, F64, BF16, F16 };
enum Kind { PLAIN, SOFT, BLOCKS };

}  // namespace

extern "C" {

struct Tensor {
  void *w, *m, *v, *scale;
  const void *old;  // W before another optimizer moved it; null: the whole step is ours
  double *sums;     // [tiles along inner levels, blocks]
  double lam;       // of SOFT
  int64_t dtype, kind, group;
  int64_t fresh;  // momentum holds nothing yet
  int64_t moves;  // else only its norms take part
  int64_t num_levels, innermost_is_grid, num_tiles, first_tile, num_inner_tiles, num_blocks;
  int64_t size[MAX_LEVELS], tile[MAX_LEVELS];
};

struct Unit {
  int64_t first_member, num_members, num_blocks;
  double lam;
  const double *lams;  // per block, in place of lam; null: lam
};

typedef void (*Work)(int64_t, int64_t, void *);
typedef int32_t (*ParallelFor)(int64_t, int64_t, int64_t, Work, void *);

struct Plan {
  Tensor *tensors;
  const Options *options;
  const Unit *units;
  const int64_t *members;    // indices of tensors, unit after unit
  const void *const *grads;  // of the tensors
  int64_t num_tensors, num_units, num_tiles, num_threads;
  ParallelFor parallel_for;
};
}

namespace {

// One tile of one tensor. `STEP` false: only the sums of squares of V as it is.
template <class T, bool STEP>
struct Tile {
  using Stored = typename T::Stored;
  using W = typename T::Wide;
  const Tensor &t;
  const Stored *g;
  const Factors<W> f;
  double *sums;  // of the blocks, for this tile's place along inner levels
  int64_t low[MAX_LEVELS], high[MAX_LEVELS];
  W spread[CHUNK];

  Tile(const Tensor &t_, const void *g_, const Options &o, int64_t tile)
      : t(t_), g(static_cast<const Stored *>(g_)), f(o, t_.lam, t_.fresh) {
    int64_t count[MAX_LEVELS], place = 0;
    for (int64_t k = t.num_levels - 1; k >= 0; k--) {
      count[k] = (t.size[k] + t.tile[k] - 1) / t.tile[k];
      low[k] = tile % count[k] * t.tile[k];
      high[k] = low[k] + t.tile[k] < t.size[k] ? low[k] + t.tile[k] : t.size[k];
      tile /= count[k];
    }
    for (int64_t k = 0; k < t.num_levels; k++)
      if (!is_grid(k)) place = place * count[k] + low[k] / t.tile[k];
    sums = t.sums + place * t.num_blocks;
  }

  // Levels alternate between the grid of blocks and the inside of a block.
  bool is_grid(int64_t k) const { return ((t.num_levels - 1 - k) % 2 == 0) == !!t.innermost_is_grid; }

  void run() {
    int64_t at[MAX_LEVELS];
    const int64_t outer = t.num_levels - 2;  // the last two levels are walked by `rows`
    for (int64_t k = 0; k < outer; k++) at[k] = low[k];
    while (true) {
      int64_t element = 0, block = 0;
      for (int64_t k = 0; k < outer; k++) {
        element = element * t.size[k] + at[k];
        if (is_grid(k)) block = block * t.size[k] + at[k];
      }
      rows(element, block);
      int64_t k = outer - 1;
      for (; k >= 0 && ++at[k] == high[k]; k--) at[k] = low[k];
      if (k < 0) return;
    }
  }

  void rows(int64_t element, int64_t block) {
    const int64_t last = t.num_levels - 1, width = t.size[last];
    const bool in_grid = t.innermost_is_grid;
    const int64_t first = last ? low[last - 1] : 0, end = last ? high[last - 1] : 1;
    if (last) element *= t.size[last - 1];
    if (last && !in_grid) block *= t.size[last - 1];
    const bool whole = low[last] == 0 && high[last] == width;
    const bool together = t.kind == BLOCKS && whole && width <= (in_grid ? CHUNK / 2 : SHORT);
    const int64_t step = together ? CHUNK / width : 1;
    for (int64_t x = first; x < end; x += step) {
      const int64_t count = x + step < end ? step : end - x;
      if (together) {
        const int64_t at = (element + x) * width;
        if (in_grid)
          columns(at, block * width, count, width);
        else if (width == 9)  // 3 x 3 kernels
          short_rows<9>(at, block + x, count, width);
        else
          short_rows<0>(at, block + x, count, width);
        continue;
      }
      for (int64_t y = low[last]; y < high[last]; y += CHUNK) {
        const int64_t n = y + CHUNK < high[last] ? CHUNK : high[last] - y;
        const int64_t at = (element + x) * width + y;
        if (in_grid) {
          const int64_t own = block * width + y;
          move<MANY_SCALES>(at, scales() + own, n);
          add_squares(v() + at, sums + own, n);
        } else {
          long_row(at, block + (last ? x : 0), n);
        }
      }
    }
  }

  void long_row(int64_t at, int64_t block, int64_t n) {
    if (t.kind == PLAIN) return move<NO_V>(at, nullptr, n);
    if (t.kind == SOFT) return move<SOFT_V>(at, nullptr, n);
    const W *s = scales() + block;
    if (STEP && n >= LANES) {
      double lane[LANES] = {0};
      move<ONE_SCALE, true>(at, s, n, lane);
      sums[block] += joined(lane);
    } else {
      move<ONE_SCALE>(at, s, n);
      sums[block] += sum_of_squares(v() + at, n);
    }
  }

  template <int WIDTH>
  void short_rows(int64_t at, int64_t block, int64_t count, int64_t any_width) {
    const int64_t width = WIDTH ? WIDTH : any_width;
    if (STEP) {
      W *next = spread;
      for (int64_t x = 0; x < count; x++)
        for (int64_t y = 0; y < width; y++) *next++ = scales()[block + x];
    }
    move<MANY_SCALES>(at, spread, count * width);
    for (int64_t x = 0; x < count; x++)
      sums[block + x] += sum_of_squares(v() + at + x * width, width);
  }

  void columns(int64_t at, int64_t block, int64_t count, int64_t width) {
    if (STEP)
      for (int64_t x = 0; x < count; x++)
        std::memcpy(spread + x * width, scales() + block, width * sizeof(W));
    move<MANY_SCALES>(at, spread, count * width);
    for (int64_t x = 0; x < count; x++) add_squares(v() + at + x * width, sums + block, width);
  }

  W *v() const { return static_cast<W *>(t.v); }
  const W *scales() const { return static_cast<const W *>(t.scale); }

  template <int S, bool SUMS = false>
  void move(int64_t at, const W *s, int64_t n, double *lane = nullptr) {
    if (!STEP) return;
    Chunk<T> c{static_cast<Stored *>(t.w) + at, g + at, nullptr, nullptr, nullptr, s, W(0), f};
    if (S != NO_V) c.v = v() + at;
    if (S == ONE_SCALE) c.scale = *s;
    if (t.old) {
      c.old = static_cast<const Stored *>(t.old) + at;
      if (S != NO_V) move_all<T, S, COUPLE, SUMS>(c, n, lane);
    } else if (t.m) {
      c.m = static_cast<Stored *>(t.m) + at;
      move_all<T, S, MOMENTUM_STEP, SUMS>(c, n, lane);
    } else {
      move_all<T, S, PLAIN_STEP, SUMS>(c, n, lane);
    }
  }
};

template <bool STEP>
void run_tile(const Plan &plan, int64_t tensor, int64_t tile) {
  const Tensor &t = plan.tensors[tensor];
  const Options &o = plan.options[t.group];
  const void *g = STEP ? plan.grads[tensor] : nullptr;
  switch (t.dtype) {
    case F32: return Tile<Float, STEP>(t, g, o, tile).run();
    case F64: return Tile<Double, STEP>(t, g, o, tile).run();
    case BF16: return Tile<BFloat16, STEP>(t, g, o, tile).run();
#ifdef __FLT16_MANT_DIG__
    case F16: return Tile<Half, STEP>(t, g, o, tile).run();
#endif
  }
}

template <bool STEP>
void run_tiles(const Plan &plan, int64_t tile, int64_t end) {
  int64_t low = 0, high = plan.num_tensors - 1;
  while (low < high) {  // the last tensor whose first tile is not behind this one
    const int64_t middle = (low + high + 1) / 2;
    plan.tensors[middle].first_tile <= tile ? low = middle : high = middle - 1;
  }
  for (; tile < end; tile++) {
    while (tile >= plan.tensors[low].first_tile + plan.tensors[low].num_tiles) low++;
    const Tensor &t = plan.tensors[low];
    if (!STEP || t.moves) run_tile<STEP>(plan, low, tile - t.first_tile);
  }
}

// kappa max(0, 1 - lam/||V_u||) of some blocks of a unit, from the sums the last step left; those
// of tensors that move are set back to zero for the sums of this step.
template <class W>
void store_scales(const Tensor &t, const double *scale, int64_t block, int64_t n, double kappa) {
  W *own = static_cast<W *>(t.scale) + block;
  for (int64_t i = 0; i < n; i++) own[i] = W(scale[i]) * W(kappa);
}

void scale_blocks(const Plan &plan, const Unit &unit, int64_t block, int64_t n) {
  double total[CHUNK] = {0}, own[CHUNK];
  for (int64_t j = 0; j < unit.num_members; j++) {
    const Tensor &t = plan.tensors[plan.members[unit.first_member + j]];
    std::memset(own, 0, n * sizeof(double));
    for (int64_t k = 0; k < t.num_inner_tiles; k++) {
      double *part = t.sums + k * t.num_blocks + block;
      for (int64_t i = 0; i < n; i++) own[i] += part[i];
      if (t.moves) std::memset(part, 0, n * sizeof(double));
    }
    for (int64_t i = 0; i < n; i++) total[i] += own[i];
  }
  for (int64_t i = 0; i < n; i++) {
    const double norm = std::sqrt(total[i]), lam = unit.lams ? unit.lams[block + i] : unit.lam;
    // As structure.shrink_scale: positive exactly above lam, and a NaN stays visible.
    total[i] = norm <= lam ? 0.0 : (norm - lam) / norm;
  }
  for (int64_t j = 0; j < unit.num_members; j++) {
    const Tensor &t = plan.tensors[plan.members[unit.first_member + j]];
    const double kappa = plan.options[t.group].kappa;
    t.dtype == F64 ? store_scales<double>(t, total, block, n, kappa)
                   : store_scales<float>(t, total, block, n, kappa);
  }
}

// Hands out pieces of work to the threads of torch's pool as they come for it. All of them take
// over the caller's floating point environment: torch.set_flush_denormal sets it for one thread.
struct Queue {
  const Plan *plan;
  void (*work)(const Plan &, int64_t, int64_t);
  int64_t end, piece;
  std::fenv_t environment;
  std::atomic<int64_t> next{0};

  static void take(int64_t, int64_t, void *self) {
    Queue &q = *static_cast<Queue *>(self);
    std::fenv_t own;
    std::fegetenv(&own);
    std::fesetenv(&q.environment);
    for (int64_t at; (at = q.next.fetch_add(q.piece, std::memory_order_relaxed)) < q.end;)
      q.work(*q.plan, at, at + q.piece < q.end ? at + q.piece : q.end);
    std::fesetenv(&own);
  }
};

void share(const Plan &plan, void (*work)(const Plan &, int64_t, int64_t), int64_t count,
           int64_t piece) {
  Queue queue{&plan, work, count, piece, {}};
  std::fegetenv(&queue.environment);
  const int64_t pieces = (count + piece - 1) / piece;
  const int64_t threads = plan.num_threads < pieces ? plan.num_threads : pieces;
  if (threads < 2 || plan.parallel_for(0, threads, 1, Queue::take, &queue) != 0)
    Queue::take(0, 0, &queue);
}

void scale_units(const Plan &plan, int64_t at, int64_t end) {
  int64_t first = 0;  // blocks are numbered through all units
  for (int64_t i = 0; i < plan.num_units && first < end; i++) {
    const Unit &unit = plan.units[i];
    const int64_t low = at > first ? at - first : 0;
    const int64_t high = end - first < unit.num_blocks ? end - first : unit.num_blocks;
    for (int64_t block = low; block < high; block += CHUNK)
      scale_blocks(plan, unit, block, high - block < CHUNK ? high - block : CHUNK);
    first += unit.num_blocks;
  }
}

}  // namespace

extern "C" {

// Struct sizes, so that kernels/cpu.py can tell that both sides mean the same.
int64_t dessilbi_size(int64_t which) {
  const int64_t sizes[] = {sizeof(Options), sizeof(Tensor), sizeof(Unit), sizeof(Plan)};
  return sizes[which];
}

int64_t dessilbi_has_float16() {
#ifdef __FLT16_MANT_DIG__
  return 1;
#else
  return 0;
#endif
}

// The sums of squares of one tensor's V, as a step would have left them.
void dessilbi_sums(const Plan *plan, int64_t tensor) {
  const Tensor &t = plan->tensors[tensor];
  std::memset(t.sums, 0, sizeof(double) * t.num_inner_tiles * t.num_blocks);
  Plan part = *plan;
  Tensor alone = t;
  alone.first_tile = 0;
  part.tensors = &alone;
  part.num_tensors = 1;
  share(part, run_tiles<false>, t.num_tiles, 1);
}

void dessilbi_step(const Plan *plan) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < plan->num_units; i++) blocks += plan->units[i].num_blocks;
  if (blocks) share(*plan, scale_units, blocks, 4096);
  if (plan->num_tiles) share(*plan, run_tiles<true>, plan->num_tiles, 1);
}
}
