#pragma once

/// Marks what libditattn exports; everything else in it is hidden.
#define DITATTN_API __attribute__((visibility("default")))
