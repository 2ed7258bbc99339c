// llama.cpp's log, kept in memory: a library must not print, but an error message may quote the last lines.

#include "zoomr.h"

#include "ggml.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <mutex>
#include <string>

// enough for the lines around a failed load, small enough to forget about
static constexpr size_t ZOOMR_LOG_LINES = 256;

struct zoomr_log_line {
    int32_t     level;
    std::string text;
};

// never destroyed: llama.cpp may log from other static destructors
static std::mutex                 & g_mutex = *new std::mutex;
static std::deque<zoomr_log_line> & g_lines = *new std::deque<zoomr_log_line>;

static void zoomr_log_callback(ggml_log_level level, const char * text, void * /*user_data*/) {
    std::lock_guard<std::mutex> lock(g_mutex);

    if (level == GGML_LOG_LEVEL_CONT && !g_lines.empty()) {
        g_lines.back().text += text;
        return;
    }

    g_lines.push_back({ (int32_t) level, text });
    if (g_lines.size() > ZOOMR_LOG_LINES) {
        g_lines.pop_front();
    }
}

void zoomr_log_capture(void) {
    llama_log_set(zoomr_log_callback, nullptr);
}

size_t zoomr_log_tail(char * dst, size_t size, int32_t level_min) {
    std::lock_guard<std::mutex> lock(g_mutex);

    std::string out;
    for (auto it = g_lines.rbegin(); it != g_lines.rend(); ++it) {
        if (it->level < level_min) {
            continue;
        }
        if (out.size() + it->text.size() + 1 > size) {
            break;
        }
        out = it->text + out;
    }

    if (size > 0) {
        memcpy(dst, out.c_str(), out.size() + 1);
    }
    return out.size();
}
