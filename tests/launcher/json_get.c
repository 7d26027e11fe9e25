// json_get KEY ...: for each line of standard input, which must be a JSON value, prints what stands at the keys, e.g.
// "response.body.choices.0.text", with tabs between. Strings are printed as they are in JSON, a value that is not there
// as "-". Fails at a line that is not JSON, so that a script can check that it is.
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const json_t *find(const json_t *value, const char *path) {
    while (value && *path) {
        const size_t n = strcspn(path, ".");
        char key[256];
        snprintf(key, sizeof key, "%.*s", (int)n, path);
        value = json_is_array(value) ? json_array_get(value, strtoul(key, NULL, 10)) : json_object_get(value, key);
        path += n + (path[n] == '.');
    }
    return value;
}

int main(int argc, char **argv) {
    char *line = NULL;
    size_t capacity = 0;
    long number = 0;
    for (ssize_t n; (n = getline(&line, &capacity, stdin)) >= 0;) {
        json_error_t error;
        json_t *value = json_loadb(line, (size_t)n, JSON_DECODE_ANY | JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &error);
        number++;
        if (!value) {
            fprintf(stderr, "json_get: line %ld: %s: %s", number, error.text, line);
            return 1;
        }
        for (int i = 1; i < argc; i++) {
            const json_t *found = find(value, argv[i]);
            if (i > 1)
                putchar('\t');
            if (found)
                json_dumpf(found, stdout, JSON_ENCODE_ANY | JSON_COMPACT);
            else
                putchar('-');
        }
        putchar('\n');
        json_decref(value);
    }
    free(line);
    return 0;
}
