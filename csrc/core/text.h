// Error messages: concatenate anything printable.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace octavo {

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// A caller's mistake becomes ValueError in Python: say what was given, what was expected, what to
// do.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) throw std::invalid_argument(text(parts...));
}

}  // namespace octavo
