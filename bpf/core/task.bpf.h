/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
#ifndef STREAMER_TASK_H
#define STREAMER_TASK_H
#include "core.bpf.h"
#endif
