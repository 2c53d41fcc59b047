/* How an exported function is named, and what keeps the copies for different instruction sets apart.
 *
 * Every .cpp file is compiled once for each instruction set, and all objects are linked into one library. A function
 * with external linkage that two copies share (a template or inline function, those of the standard library too) would
 * be kept once, perhaps in the copy that this CPU cannot run. So all that is not exported lies in an unnamed namespace,
 * and nothing of std:: is used that leaves a function behind (containers, algorithms); a test looks for such symbols.
 */
#pragma once

#include <cstdint>

#define MOE_JOIN_EXPANDED(name, level) name##_##level
#define MOE_JOIN(name, level) MOE_JOIN_EXPANDED(name, level)

/* An exported function in this copy. */
#define MOE_NAME(name) MOE_JOIN(name, MOE_LEVEL)

/* Starts the definition of an exported function: `MOE_EXPORT(void, moe_linear)(const void *x, ...) { ... }`. */
#define MOE_EXPORT(result, name) extern "C" __attribute__((visibility("default"))) result MOE_NAME(name)
