// Compares the kernels with plain loops, without Python: for processors that are only emulated.
// Prints the instruction set, the largest error relative to the largest sum, and how many bytes of int8 layers differ;
// exits with 1 above the tolerance, or if any byte differs.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "api.h"

namespace {

std::mt19937 g_random(1);

float number() { return std::uniform_real_distribution<float>(-1, 1)(g_random); }

std::vector<float> numbers(size_t count) {
  std::vector<float> made(count);
  for (float& x : made) x = number();
  return made;
}

struct Packed {
  std::vector<float> dense, bias;  // (groups * outputs, reduction)
  std::vector<int64_t> bytes;
  int64_t size = 0;
};

Packed make(const int64_t shape[5], double density) {
  const int64_t rows = shape[0] * shape[2], reduction = shape[1] * shape[3] * shape[4];
  Packed made{numbers(size_t(rows * reduction)), numbers(size_t(rows)), {}, 0};
  std::vector<int64_t> starts{0};
  std::vector<int32_t> columns;
  std::vector<float> values;
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t k = 0; k < reduction; k++) {
      float& w = made.dense[size_t(r * reduction + k)];
      if (std::abs(number()) > density) w = 0;
      if (w != 0) columns.push_back(int32_t(k)), values.push_back(w);
    }
    starts.push_back(int64_t(columns.size()));
  }
  int64_t block = 0;
  const char* problem = nestify_packed_size(shape, starts.data(), columns.data(), 32, &block, &made.size);
  made.bytes.resize(size_t(made.size / 8 + 1));
  if (!problem)
    problem = nestify_pack(shape, starts.data(), columns.data(), values.data(), 32, made.bias.data(), block,
                           made.bytes.data(), made.size);
  if (problem) std::printf("%s\n", problem), std::exit(2);
  return made;
}

// batch, groups, inputs, outputs, height, width, kernel, stride, padding, dilation
double conv_error(const int64_t c[10]) {
  const int64_t n = c[0], groups = c[1], inputs = c[2], outputs = c[3], h = c[4], w = c[5], k = c[6], s = c[7];
  const int64_t p = c[8], d = c[9], oh = (h + 2 * p - d * (k - 1) - 1) / s + 1, ow = (w + 2 * p - d * (k - 1) - 1) / s + 1;
  const int64_t shape[5] = {outputs, inputs, groups, k, k}, geometry[8] = {s, s, p, p, p, p, d, d};
  const Packed layer = make(shape, 0.3);
  const std::vector<float> x = numbers(size_t(n * groups * inputs * h * w));
  const std::vector<float> added = numbers(size_t(n * groups * outputs * oh * ow));
  std::vector<float> found(added.size(), NAN);
  if (const char* problem = nestify_conv(layer.bytes.data(), layer.size, x.data(), n, h, w, geometry, added.data(),
                                         -1, 2, found.data(), int64_t(found.size())))
    std::printf("%s\n", problem), std::exit(2);
  double worst = 0, largest = 0;
  size_t place = 0;
  for (int64_t image = 0; image < n; image++)
    for (int64_t o = 0; o < groups * outputs; o++)
      for (int64_t y = 0; y < oh; y++)
        for (int64_t z = 0; z < ow; z++, place++) {
          double sum = double(layer.bias[size_t(o)]) + double(added[place]);
          for (int64_t i = 0; i < inputs; i++)
            for (int64_t a = 0; a < k; a++)
              for (int64_t b = 0; b < k; b++) {
                const int64_t row = y * s + a * d - p, column = z * s + b * d - p;
                if (row < 0 || row >= h || column < 0 || column >= w) continue;
                const int64_t channel = image * groups * inputs + o / outputs * inputs + i;
                sum += double(layer.dense[size_t(((o * inputs + i) * k + a) * k + b)]) *
                       double(x[size_t((channel * h + row) * w + column)]);
              }
          largest = std::max(largest, std::abs(sum));
          const double error = std::abs(std::clamp(sum, -1.0, 2.0) - double(found[place]));
          worst = std::isnan(error) ? INFINITY : std::max(worst, error);
        }
  return worst / largest;
}

double linear_error(int64_t tokens, int64_t inputs, int64_t outputs) {
  const int64_t shape[5] = {outputs, inputs, 1, 1, 1};
  const Packed layer = make(shape, 0.3);
  const std::vector<float> x = numbers(size_t(tokens * inputs));
  std::vector<float> found(size_t(tokens * outputs), NAN);
  if (const char* problem = nestify_linear(layer.bytes.data(), layer.size, x.data(), tokens, nullptr, -INFINITY,
                                           INFINITY, found.data()))
    std::printf("%s\n", problem), std::exit(2);
  double worst = 0, largest = 0;
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t o = 0; o < outputs; o++) {
      double sum = double(layer.bias[size_t(o)]);
      for (int64_t i = 0; i < inputs; i++)
        sum += double(layer.dense[size_t(o * inputs + i)]) * double(x[size_t(t * inputs + i)]);
      largest = std::max(largest, std::abs(sum));
      const double error = std::abs(sum - double(found[size_t(t * outputs + o)]));
      worst = std::isnan(error) ? INFINITY : std::max(worst, error);
    }
  return worst / largest;
}

struct PackedInt8 {
  std::vector<int8_t> dense;  // (outputs, inputs, k * k)
  std::vector<int32_t> bias;
  std::vector<int64_t> bytes;
  int64_t size = 0;
};

// A layer of one group with a square kernel, whose multipliers are 1 / 512.
PackedInt8 make_int8(int64_t inputs, int64_t outputs, int64_t k) {
  const int64_t quads = (inputs + 3) / 4;
  PackedInt8 made{std::vector<int8_t>(size_t(outputs * inputs * k * k)), {}, {}, 0};
  std::vector<int8_t> values;
  std::vector<int64_t> starts{0};
  std::vector<int32_t> columns;
  for (int64_t o = 0; o < outputs; o++) {
    for (int64_t column = 0; column < quads * k * k; column++) {
      if (std::abs(number()) > 0.3f) continue;
      columns.push_back(int32_t(column));
      for (int64_t c = 0; c < 4; c++) {
        const int64_t channel = column / (k * k) * 4 + c;
        const auto w = int8_t(channel < inputs ? number() * 128 : 0);
        values.push_back(w);
        if (channel < inputs) made.dense[size_t((o * inputs + channel) * k * k + column % (k * k))] = w;
      }
    }
    starts.push_back(int64_t(columns.size()));
    made.bias.push_back(int32_t(number() * 9999));
  }
  const int64_t shape[5] = {outputs, inputs, 1, k, k};
  const std::vector<float> multipliers(size_t(outputs), 1.0f / 512);
  int64_t block = 0;
  const char* problem = nestify_packed_int8_size(shape, starts.data(), columns.data(), &block, &made.size);
  made.bytes.resize(size_t(made.size / 8 + 1));
  if (!problem)
    problem = nestify_pack_int8(shape, starts.data(), columns.data(), values.data(), made.bias.data(),
                                multipliers.data(), block, made.bytes.data(), made.size);
  if (problem) std::printf("%s\n", problem), std::exit(2);
  return made;
}

std::vector<uint8_t> bytes_at_random(size_t count) {
  std::vector<uint8_t> made(count);
  for (uint8_t& x : made) x = uint8_t(g_random());
  return made;
}

// Counts the bytes that differ; padding has the zero point's value.
int64_t int8_differences(int64_t inputs, int64_t outputs, int64_t side, int64_t k, int64_t stride, int64_t pad) {
  const int64_t zero = 37, out = (side + 2 * pad - k) / stride + 1;
  const int64_t geometry[8] = {stride, stride, pad, pad, pad, pad, 1, 1};
  const PackedInt8 layer = make_int8(inputs, outputs, k);
  const std::vector<uint8_t> x = bytes_at_random(size_t(inputs * side * side));
  std::vector<uint8_t> found(size_t(outputs * out * out)), added(found.size(), 200);
  const int32_t limits[5] = {int32_t(zero), 90, 3, 250, 180};
  if (const char* problem = nestify_conv_int8(layer.bytes.data(), layer.size, x.data(), 1, side, side, geometry, limits,
                                              added.data(), 0.5f, found.data(), int64_t(found.size())))
    std::printf("%s\n", problem), std::exit(2);
  int64_t differences = 0;
  for (int64_t o = 0; o < outputs; o++)
    for (int64_t y = 0; y < out; y++)
      for (int64_t z = 0; z < out; z++) {
        int64_t sum = layer.bias[size_t(o)];
        for (int64_t i = 0; i < inputs; i++)
          for (int64_t t = 0; t < k * k; t++) {
            const int64_t row = y * stride + t / k - pad, column = z * stride + t % k - pad;
            const bool inside = row >= 0 && row < side && column >= 0 && column < side;
            const int64_t pixel = inside ? x[size_t((i * side + row) * side + column)] : zero;
            sum += layer.dense[size_t((o * inputs + i) * k * k + t)] * pixel;
          }
        const double scaled = std::nearbyint(double(sum) / 512 + 10) + 90;  // 10 is (200 - 180) / 2
        differences += found[size_t((o * out + y) * out + z)] != uint8_t(std::clamp(scaled, 3.0, 250.0));
      }
  return differences;
}

// The same for a depthwise convolution.
int64_t depthwise_differences(int64_t channels, int64_t side, int64_t k, int64_t stride, int64_t pad) {
  const int64_t zero = 37, out = (side + 2 * pad - k) / stride + 1;
  const int64_t geometry[8] = {stride, stride, pad, pad, pad, pad, 1, 1}, shape[5] = {1, 1, channels, k, k};
  const std::vector<uint8_t> random = bytes_at_random(size_t(channels * k * k));
  const std::vector<int8_t> weights(random.begin(), random.end());
  const std::vector<float> multipliers(size_t(channels), 1.0f / 512);
  int64_t size = 0;
  const char* problem = nestify_packed_depthwise_size(shape, &size);
  std::vector<int64_t> bytes(size_t(size / 8 + 1));
  if (!problem)
    problem = nestify_pack_depthwise(shape, weights.data(), nullptr, multipliers.data(), bytes.data(), size);
  const std::vector<uint8_t> x = bytes_at_random(size_t(channels * side * side));
  std::vector<uint8_t> found(size_t(channels * out * out)), added(found.size(), 200);
  const int32_t limits[5] = {int32_t(zero), 90, 3, 250, 180};
  if (!problem)
    problem = nestify_conv_int8(bytes.data(), size, x.data(), 1, side, side, geometry, limits, added.data(), 0.5f,
                                found.data(), int64_t(found.size()));
  if (problem) std::printf("%s\n", problem), std::exit(2);
  int64_t differences = 0;
  for (int64_t i = 0; i < channels; i++)
    for (int64_t y = 0; y < out; y++)
      for (int64_t z = 0; z < out; z++) {
        int64_t sum = 0;
        for (int64_t t = 0; t < k * k; t++) {
          const int64_t row = y * stride + t / k - pad, column = z * stride + t % k - pad;
          const bool inside = row >= 0 && row < side && column >= 0 && column < side;
          sum += weights[size_t(i * k * k + t)] * int64_t(inside ? x[size_t((i * side + row) * side + column)] : zero);
        }
        const double scaled = std::nearbyint(double(sum) / 512 + 10) + 90;  // 10 is (200 - 180) / 2
        differences += found[size_t((i * out + y) * out + z)] != uint8_t(std::clamp(scaled, 3.0, 250.0));
      }
  return differences;
}

// The same for a linear layer.
int64_t int8_linear_differences(int64_t tokens, int64_t inputs, int64_t outputs) {
  const PackedInt8 layer = make_int8(inputs, outputs, 1);
  const std::vector<uint8_t> x = bytes_at_random(size_t(tokens * inputs));
  std::vector<uint8_t> found(size_t(tokens * outputs));
  const int32_t limits[4] = {37, 90, 3, 250};
  if (const char* problem =
          nestify_linear_int8(layer.bytes.data(), layer.size, x.data(), tokens, limits, found.data()))
    std::printf("%s\n", problem), std::exit(2);
  int64_t differences = 0;
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t o = 0; o < outputs; o++) {
      int64_t sum = layer.bias[size_t(o)];
      for (int64_t i = 0; i < inputs; i++) sum += layer.dense[size_t(o * inputs + i)] * x[size_t(t * inputs + i)];
      const double scaled = std::nearbyint(double(sum) / 512) + 90;
      differences += found[size_t(t * outputs + o)] != uint8_t(std::clamp(scaled, 3.0, 250.0));
    }
  return differences;
}

}  // namespace

int main() {
  const int64_t cases[][10] = {
      {1, 1, 64, 32, 14, 14, 1, 1, 0, 1}, {2, 1, 150, 40, 7, 7, 1, 1, 0, 1}, {3, 1, 33, 24, 15, 13, 3, 1, 1, 1},
      {1, 1, 48, 64, 28, 28, 3, 2, 1, 1}, {1, 2, 8, 12, 11, 9, 3, 1, 1, 2},  {1, 1, 3, 16, 32, 32, 8, 8, 0, 1},
      {2, 1, 40, 24, 14, 15, 1, 2, 0, 1}, {1, 3, 16, 8, 20, 22, 5, 3, 2, 1}, {1, 1, 8, 8, 3, 3, 3, 1, 0, 1},
  };
  double worst = 0;
  for (const auto& c : cases) worst = std::max(worst, conv_error(c));
  for (const int64_t tokens : {1, 2, 50, 197}) worst = std::max(worst, linear_error(tokens, 100, 72));
  int64_t differences = int8_differences(64, 32, 14, 1, 1, 0) + int8_differences(1030, 9, 7, 1, 1, 0);
  differences += int8_differences(33, 24, 15, 3, 1, 1) + int8_differences(16, 16, 28, 3, 2, 1);
  for (const int64_t k : {3, 4, 5, 7})
    for (const int64_t stride : {1, 2, 3})
      for (const int64_t side : {7, 16, 37}) differences += depthwise_differences(5, side, k, stride, k / 2);
  for (const int64_t tokens : {1, 2, 50, 197}) differences += int8_linear_differences(tokens, 101, 75);
  const char* isa = "";
  nestify_engine_isa(&isa);
  std::printf("%s %.3g %d\n", isa, worst, int(differences));
  return worst < 5e-6 && differences == 0 ? 0 : 1;
}
