/* What cuda.h here has already. */
#pragma once
#include "cuda.h"
