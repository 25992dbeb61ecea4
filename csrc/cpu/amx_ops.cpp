#include "cpu/amx_ops.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "cpu/kernels/amx_linear.h"
#include "cpu/kernels/thresholds.h"
#include "cpu/scratch.h"
#include "tiles.h"

namespace quantopt {

#ifdef QUANTOPT_HAVE_AMX

namespace {

using amx::Form;
using amx::Product;

bool enough_rows(Form form, int64_t weights, int64_t rows) {
  using namespace thresholds;
  switch (form) {
    case Form::int8: return reached(kAmxInt8, weights, rows);
    case Form::bfloat16: return reached(kAmxBFloat16, weights, rows);
    case Form::parts: return reached(kAmxParts, weights, rows);
  }
  return false;
}

// How a product is shared out among threads: outputs first, as each thread then reads weights of its own.
struct Shares {
  int64_t rows, outputs;
};
Shares shares_of(int64_t blocks, int64_t tiles, int64_t work) {
  constexpr int64_t kTiles = 16;  // that a thread takes at least, so that reading x takes little of its time
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), 1 + work / kThreadWork);
  const int64_t outputs = std::clamp<int64_t>(tiles / kTiles, 1, threads);
  return {std::min(blocks, (threads + outputs - 1) / outputs), outputs};
}

// Rows of x that are put into registers together, so that they fit in the third-level cache.
int64_t rows_at_once(const Product& product) {
  constexpr int64_t kBytes = 8 << 20;
  const int64_t each = product.p.inputs * (product.form == Form::int8    ? 1
                                           : product.form == Form::parts ? 6
                                                                         : 2);
  return std::max<int64_t>(kBytes / (each + 1) / amx::kRowsTogether * amx::kRowsTogether,
                           8 * amx::kRowsTogether);
}

// `body(begin, end)` over [0, count) in `shares` even parts.
template <class Body>
void in_shares(int64_t count, int64_t shares, const Body& body) {
  at::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(i * count / shares, (i + 1) * count / shares);
  });
}

void run(const Product& product) {
  const LinearProblem& p = product.p;
  const int64_t blocks = (p.rows + amx::kRowsTogether - 1) / amx::kRowsTogether,
                tiles = tile_count(p.outputs);
  const Scratch<struct Registers> rows(amx::rows_memory(product));
  constexpr int64_t kPutWork = 16384;  // values that a thread should take at least
  const Shares shares = shares_of(blocks, tiles, p.rows * p.outputs / 32 * p.inputs);
  const int64_t putters = std::min<int64_t>(at::get_num_threads(), 1 + p.rows * p.inputs / kPutWork);
  in_shares(p.rows, putters,
            [&](int64_t begin, int64_t end) { amx::put_rows(product, begin, end, rows.get()); });
  at::parallel_for(0, shares.rows * shares.outputs, 1, [&](int64_t first, int64_t last) {
    const Scratch<struct Working> memory(amx::working_memory(product));
    for (int64_t i = first; i < last; ++i) {
      const int64_t r = i / shares.outputs, n = i % shares.outputs;
      const int64_t end = std::min(p.rows, (r + 1) * blocks / shares.rows * amx::kRowsTogether);
      amx::multiply(product, rows.get(), r * blocks / shares.rows * amx::kRowsTogether, end,
                    n * tiles / shares.outputs, (n + 1) * tiles / shares.outputs, memory.get());
    }
  });
}

}  // namespace

at::Tensor linear_on_amx(const BinaryKernels& kernels, const BinaryArguments& w, const at::Tensor& given,
                         const at::Tensor& x_scale, at::ScalarType y_type) {
  if (w.inputs == 0 || given.numel() == 0) return {};
  const bool half = w.round || given.scalar_type() == at::kBFloat16;
  const int64_t count = given.numel() / w.inputs;
  Product product{};
  product.form = w.quantize ? Form::int8 : half ? Form::bfloat16 : Form::parts;
  if (!enough_rows(product.form, w.outputs * w.inputs, count)) return {};
  LinearProblem& p = product.p;
  p = weights_of(w);
  p.rows = count;
  const bool levels = w.quantize && takes_levels(p.plane_weights, p.planes, p.inputs);
  if (!amx::takes(p, product.form, levels)) return {};
  const at::Tensor layout = linear_tiles(kernels, w);
  p.tiles = reinterpret_cast<const uint16_t*>(layout.const_data_ptr<int16_t>());
  const at::Tensor scales = linear_group_scales(kernels, w, layout, p);
  const at::Tensor x = as_type(given, half ? at::kBFloat16 : at::kFloat).contiguous();
  if (half) {
    product.x_bf16 = bf16_data(x);
  } else {
    product.x = x.const_data_ptr<float>();
  }
  if (x_scale.defined()) product.x_scale = x_scale.const_data_ptr<float>();
  c10::SmallVector<int64_t, 5> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = w.outputs;
  const bool half_y = y_type == at::kBFloat16;
  at::Tensor y = dense_tensor(shape, half_y ? at::kBFloat16 : at::kFloat);
  product.y_stride = w.outputs;
  const int64_t most = rows_at_once(product);
  for (int64_t first = 0; first < count; first += most) {
    Product some = product;
    some.p.rows = std::min(most, count - first);
    if (half) {
      some.x_bf16 += first * w.inputs;
    } else {
      some.x += first * w.inputs;
    }
    if (half_y) {
      some.y_bf16 = reinterpret_cast<uint16_t*>(y.mutable_data_ptr<at::BFloat16>()) + first * w.outputs;
    } else {
      some.y = y.mutable_data_ptr<float>() + first * w.outputs;
    }
    if (some.x_scale != nullptr) some.x_scale += first;
    run(some);
  }
  return y;
}

#else

at::Tensor linear_on_amx(const BinaryKernels&, const BinaryArguments&, const at::Tensor&, const at::Tensor&,
                         at::ScalarType) {
  return {};
}

#endif

}  // namespace quantopt
