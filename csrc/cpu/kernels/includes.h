// What the bodies of the kernels include, outside of the namespaces that they stand in.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/intrinsics.h"
#include "cpu/kernels.h"
