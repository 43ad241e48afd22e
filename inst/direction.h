// Products in a direction of q, k and v; a prime in comments is the tangent in it (docs/derivatives.md).
#pragma once
#include "multiply.h"

// s = a . b and s' = a' . b + a . b' of a panel, [rows, PANEL] in rows `length` apart. Null: a or b does not move.
static void products(const float* a, const float* a_tangent, const float* b, const float* b_tangent, int dim, int rows, float* s,
                     float* s_tangent, long length) {
  multiply<false, false>(a, width(dim), b, PANEL, s, length, rows, PANEL, dim);
  if (a_tangent) multiply<false, false>(a_tangent, width(dim), b, PANEL, s_tangent, length, rows, PANEL, dim);
  else for (int r = 0; r < rows; r++) memset(s_tangent + r * length, 0, sizeof(float) * PANEL);
  if (b_tangent) multiply<false, true>(a, width(dim), b_tangent, PANEL, s_tangent, length, rows, PANEL, dim);
}
