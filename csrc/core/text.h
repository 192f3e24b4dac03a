// Error messages: concatenate strings and numbers.
//
// Not with streams: they look up their locale in tables that a process has once. If two of its
// libraries have different standard libraries linked in, one would find the tables of the other.
#pragma once

#include <charconv>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

namespace octavo {

template <class Part>
void append(std::string& to, const Part& part) {
  if constexpr (std::is_convertible_v<const Part&, std::string_view>) {
    to += std::string_view(part);
  } else if constexpr (std::is_same_v<Part, char>) {
    to += part;
  } else {
    static_assert(std::is_arithmetic_v<Part>, "text() takes strings and numbers");
    char digits[32];
    int length = 0;
    if constexpr (std::is_floating_point_v<Part>)
      length = std::snprintf(digits, sizeof(digits), "%g", static_cast<double>(part));
    else
      length = static_cast<int>(std::to_chars(digits, digits + sizeof(digits), +part).ptr - digits);
    to.append(digits, static_cast<std::size_t>(length));
  }
}

template <class... Parts>
std::string text(const Parts&... parts) {
  std::string result;
  (append(result, parts), ...);
  return result;
}

// A caller's mistake; ValueError in Python. Say what was given, what was expected, what to do.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) throw std::invalid_argument(text(parts...));
}

}  // namespace octavo
