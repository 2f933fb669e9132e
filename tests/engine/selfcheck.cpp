// Compares the kernels with plain loops, without Python: for processors that are only emulated.
// Prints the instruction set and the largest error relative to the largest sum; exits with 1 above the tolerance.
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
  const char* isa = "";
  nestify_engine_isa(&isa);
  std::printf("%s %.3g\n", isa, worst);
  return worst < 5e-6 ? 0 : 1;
}
