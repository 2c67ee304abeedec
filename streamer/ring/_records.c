/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Reads BPF ring buffers and perf buffers, and decodes their records straight to msgspec Structs.
 *
 * `_records.pyi` documents what Python sees; `records_py.py` is the same in plain Python and the
 * oracle of this file in the tests. The ring's format is that of the kernel (kernel/bpf/ringbuf.c):
 * a u32 of length and BUSY and DISCARD bits, a u32 that is the kernel's own, then the record,
 * rounded up to 8 bytes. Behind the data area its beginning is mapped again, so no record is ever
 * split. That of a perf buffer is mapped once; what the kernel puts there is in linux/perf_event.h.
 *
 * Three rules keep this safe and fast:
 *   - Every offset of the layout is checked when the Decoder is made, so that decoding only has
 *     to compare the record's length with the layout's size, and its strings with what is left.
 *   - Nothing of a record is committed (position, sequence, counters) before all that can fail
 *     (allocations) has succeeded: an exception never loses a record and never counts one twice.
 *   - Strings, addresses and integers repeat, so they come out of direct-mapped caches of bounded
 *     size. A cached object is always compared in full with the bytes that it stands for.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <arpa/inet.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "records are read as little-endian");
_Static_assert(sizeof(void *) == 8, "ring positions are 64 bits wide");

#define LIKELY(x) __builtin_expect(!!(x), 1)
#define UNLIKELY(x) __builtin_expect(!!(x), 0)

enum {
	RING_HEADER = 8,
	ROUND = 8,
	CPUS = 1 << 16,
	MAX_RECORD = 1 << 30,
	INT_BITS = 12,
	STR_BITS = 12,
	IP_BITS = 10,
	MAX_CACHED_STR = 256,
	MAX_STRINGS = 8, /* of a record: the bits of `cut` */
	MAX_LINE = 4096, /* bytes of an argv that a line is made of: MAX_LINE of layout.py */
};
#define BUSY_BIT (1u << 31)
#define DISCARD_BIT (1u << 30)
#define LENGTH_MASK (DISCARD_BIT - 1)
#define NS_PER_SECOND 1000000000u

/* ------------------------------------------------------------------ bytes */

static inline uint16_t load16(const uint8_t *at)
{
	uint16_t value;
	memcpy(&value, at, sizeof(value));
	return value;
}

static inline uint32_t load32(const uint8_t *at)
{
	uint32_t value;
	memcpy(&value, at, sizeof(value));
	return value;
}

static inline uint64_t load64(const uint8_t *at)
{
	uint64_t value;
	memcpy(&value, at, sizeof(value));
	return value;
}

/* 0 to 7 bytes, so that different bytes of one length give different words. */
static inline uint64_t load_tail(const uint8_t *at, size_t size)
{
	if (size >= 4)
		return load32(at) | (uint64_t)load32(at + size - 4) << 32;
	if (size == 0)
		return 0;
	return at[0] | (uint64_t)at[size / 2] << 8 | (uint64_t)at[size - 1] << 16;
}

static const uint64_t GOLDEN = 0x9E3779B97F4A7C15u; /* 2^64 over the golden ratio */

static inline uint64_t hash_bytes(const uint8_t *at, size_t size)
{
	uint64_t hash = size;
	for (; size >= 8; at += 8, size -= 8) {
		hash = (hash ^ load64(at)) * GOLDEN;
		hash ^= hash >> 32;
	}
	hash = (hash ^ load_tail(at, size)) * GOLDEN;
	return hash ^ hash >> 32;
}

static inline bool is_ascii(const uint8_t *at, size_t size)
{
	uint64_t seen = 0;
	for (; size >= 8; at += 8, size -= 8)
		seen |= load64(at);
	return ((seen | load_tail(at, size)) & 0x8080808080808080u) == 0;
}

/* ----------------------------------------------------------------- caches */

struct int_slot {
	uint64_t key;
	PyObject *value;
};

struct str_slot {
	uint64_t hash;
	PyObject *value; /* ASCII */
};

struct ip_slot {
	uint64_t low, high;
	PyObject *value;
	uint8_t version;
};

struct caches {
	struct int_slot ints[1 << INT_BITS];
	struct str_slot strs[1 << STR_BITS];
	struct ip_slot ips[1 << IP_BITS];
};

static void free_caches(struct caches *caches)
{
	if (caches == NULL)
		return;
	for (size_t i = 0; i < 1 << INT_BITS; i++)
		Py_XDECREF(caches->ints[i].value);
	for (size_t i = 0; i < 1 << STR_BITS; i++)
		Py_XDECREF(caches->strs[i].value);
	for (size_t i = 0; i < 1 << IP_BITS; i++)
		Py_XDECREF(caches->ips[i].value);
	PyMem_Free(caches);
}

static inline PyObject *int_of(struct caches *caches, uint64_t key)
{
	struct int_slot *slot = &caches->ints[key * GOLDEN >> (64 - INT_BITS)];
	if (LIKELY(slot->key == key && slot->value != NULL))
		return Py_NewRef(slot->value);
	PyObject *value = PyLong_FromUnsignedLongLong(key);
	if (value == NULL)
		return NULL;
	slot->key = key;
	Py_XSETREF(slot->value, Py_NewRef(value));
	return value;
}

/* Negative numbers are few and small, for which Python has its own cache. */
static inline PyObject *signed_of(struct caches *caches, int64_t value)
{
	return LIKELY(value >= 0) ? int_of(caches, (uint64_t)value) : PyLong_FromLongLong(value);
}

static PyObject *ascii_from(const uint8_t *at, size_t size)
{
	PyObject *text = PyUnicode_New((Py_ssize_t)size, 127);
	if (text != NULL)
		memcpy(PyUnicode_1BYTE_DATA(text), at, size);
	return text;
}

/* Where a string was cut. What is left there of a character is left off: it is no mistake. */
enum cut { WHOLE = 0, CUT_START = 1, CUT_END = 2, CUT_ANYWHERE = CUT_START | CUT_END };

/* Bytes at the start that continue a character; a character has at most three. */
static size_t continuation_size(const uint8_t *at, size_t size)
{
	size_t count = 0;
	while (count < size && count < 3 && (at[count] & 0xC0) == 0x80)
		count++;
	return count;
}

static PyObject *utf8_from(const uint8_t *at, size_t size, enum cut cut, bool *invalid)
{
	size_t skipped = cut & CUT_START ? continuation_size(at, size) : 0;
	const char *start = (const char *)at + skipped;
	Py_ssize_t left = (Py_ssize_t)(size - skipped), used;
	/* Python leaves off a character that is not complete when it can say how much it used. */
	Py_ssize_t *may_end_early = cut & CUT_END ? &used : NULL;
	PyObject *text = PyUnicode_DecodeUTF8Stateful(start, left, NULL, may_end_early);
	if (text != NULL || !PyErr_ExceptionMatches(PyExc_UnicodeDecodeError))
		return text;
	PyErr_Clear();
	*invalid = true;
	return PyUnicode_DecodeUTF8Stateful(start, left, "replace", may_end_early);
}

/* A str of UTF-8; `invalid` is set, and U+FFFD stands for the offending bytes, where it is not. */
static PyObject *str_of(struct caches *caches, const uint8_t *at, size_t size, enum cut cut,
			bool *invalid)
{
	if (size > MAX_CACHED_STR)
		return is_ascii(at, size) ? ascii_from(at, size) : utf8_from(at, size, cut, invalid);

	uint64_t hash = hash_bytes(at, size);
	struct str_slot *slot = &caches->strs[hash & ((1 << STR_BITS) - 1)];
	if (slot->hash == hash && slot->value != NULL &&
	    (size_t)PyUnicode_GET_LENGTH(slot->value) == size &&
	    memcmp(PyUnicode_1BYTE_DATA(slot->value), at, size) == 0)
		return Py_NewRef(slot->value);

	if (!is_ascii(at, size))
		return utf8_from(at, size, cut, invalid);
	PyObject *text = ascii_from(at, size);
	if (text == NULL)
		return NULL;
	slot->hash = hash;
	Py_XSETREF(slot->value, Py_NewRef(text));
	return text;
}

static PyObject *ip_text(const uint8_t *address, uint8_t version)
{
	char text[INET6_ADDRSTRLEN];
	if (inet_ntop(version == 4 ? AF_INET : AF_INET6, address, text, sizeof(text)) == NULL)
		return PyErr_SetFromErrno(PyExc_OSError);
	return PyUnicode_FromString(text);
}

static PyObject *ip_of(struct caches *caches, const uint8_t *address, uint8_t version)
{
	if (version != 4 && version != 6)
		return PyUnicode_New(0, 0);
	uint64_t low = version == 4 ? load32(address) : load64(address);
	uint64_t high = version == 4 ? 0 : load64(address + 8);
	uint64_t hash = ((low * GOLDEN ^ high) + version) * GOLDEN;
	struct ip_slot *slot = &caches->ips[hash >> (64 - IP_BITS)];
	if (slot->value != NULL && slot->low == low && slot->high == high &&
	    slot->version == version)
		return Py_NewRef(slot->value);
	PyObject *text = ip_text(address, version);
	if (text == NULL)
		return NULL;
	slot->low = low;
	slot->high = high;
	slot->version = version;
	Py_XSETREF(slot->value, Py_NewRef(text));
	return text;
}

/* ------------------------------------------------------------------ plans */

enum op_code {
	OP_U8, OP_U16, OP_U32, OP_U64, OP_S32, OP_S64, OP_NS, OP_MOMENT, OP_START, OP_SERIAL,
	OP_BOOL, OP_CSTR, OP_IP, OP_NAMES, OP_STR, OP_ARGV, OP_LINE, OP_CONST, OP_ID, OP_TIME,
	OP_BOOTTIME, OP_RFC3339, OP_CUT, OP_FLAG, OP_INVALID_UTF8, OP_PARSED, OP_PART, OP_COUNTS,
};

/* A line needs the argv, a part what was parsed, and the mark of what was replaced all strings. */
enum stage { STAGE_VALUE, STAGE_LINE, STAGE_MARK, STAGE_END };

struct op_spec {
	const char *name;
	enum op_code code;
	enum stage stage;
	uint32_t width; /* bytes read at the offset; 0: none, or as the argument says */
};

static const struct op_spec OP_SPECS[] = {
	{"u8", OP_U8, STAGE_VALUE, 1},
	{"u16", OP_U16, STAGE_VALUE, 2},
	{"u32", OP_U32, STAGE_VALUE, 4},
	{"u64", OP_U64, STAGE_VALUE, 8},
	{"s32", OP_S32, STAGE_VALUE, 4},
	{"s64", OP_S64, STAGE_VALUE, 8},
	{"ns", OP_NS, STAGE_VALUE, 8},
	{"moment", OP_MOMENT, STAGE_VALUE, 8},
	{"start", OP_START, STAGE_VALUE, 8},
	{"serial", OP_SERIAL, STAGE_VALUE, 8},
	{"bool", OP_BOOL, STAGE_VALUE, 1},
	{"cstr", OP_CSTR, STAGE_VALUE, 0},
	{"counts", OP_COUNTS, STAGE_VALUE, 0},
	{"ip", OP_IP, STAGE_VALUE, 16},
	{"names", OP_NAMES, STAGE_VALUE, 1},
	{"str", OP_STR, STAGE_VALUE, 2},
	{"argv", OP_ARGV, STAGE_VALUE, 2},
	{"line", OP_LINE, STAGE_LINE, 0},
	{"parsed", OP_PARSED, STAGE_VALUE, 2},
	{"part", OP_PART, STAGE_LINE, 0},
	{"const", OP_CONST, STAGE_VALUE, 0},
	{"id", OP_ID, STAGE_VALUE, 0},
	{"time", OP_TIME, STAGE_VALUE, 0},
	{"boottime", OP_BOOTTIME, STAGE_VALUE, 8},
	{"rfc3339", OP_RFC3339, STAGE_VALUE, 0},
	{"cut", OP_CUT, STAGE_VALUE, 1},
	{"flag", OP_FLAG, STAGE_VALUE, 1},
	{"invalid_utf8", OP_INVALID_UTF8, STAGE_MARK, 0},
};

struct op {
	enum op_code code;
	enum stage stage;
	uint32_t offset;   /* in the record */
	uint32_t argument; /* cstr: length; counts: how many; ip: offset of the version; cut, flag: mask;
			      part: index; str, argv, parsed: its bit in the base's `cut` */
	Py_ssize_t slot;   /* where the Struct keeps the field */
	PyObject *object;  /* names: tuple; cut: a tuple for each mask; const: the constant;
			      parsed: the function; else NULL */
};

struct plan {
	PyObject *kind;
	PyTypeObject *type;
	uint32_t size;
	Py_ssize_t count;
	struct op *ops;        /* `count` of them, by stage */
	Py_ssize_t string_count;
	uint32_t *strings;     /* offsets of the u16 lengths, in the order of the data */
	uint32_t line;         /* where the length of the argv is that a line is made of */
	uint8_t line_cut;      /* the bit that says that the line was cut; 0 without a line */
	bool has_subject;      /* whose durations they are is at these offsets */
	uint32_t cgroup, uid;
	uint64_t decoded;      /* events since the last finished drain */
};

static void free_plan(struct plan *plan)
{
	if (plan == NULL)
		return;
	for (Py_ssize_t i = 0; plan->ops != NULL && i < plan->count; i++)
		Py_XDECREF(plan->ops[i].object);
	Py_XDECREF(plan->kind);
	Py_XDECREF(plan->type);
	PyMem_Free(plan->ops);
	PyMem_Free(plan->strings);
	PyMem_Free(plan);
}

/* Offsets of what the reader needs of a record's base; widths are those of layout.py. */
struct header {
	uint32_t boot_ns, seq, size, kind, cpu, skipped, cut;
	uint32_t total;
};

struct header_part {
	const char *name;
	size_t member;
	uint32_t width;
};

/* Most events are of the same second as the one before. */
struct second {
	uint64_t number;   /* since the epoch */
	char text[20];     /* "2026-11-28T22:31:50.", unterminated; begins with 0 while there is none */
};

/* How coarse times are, see events/timing.py. */
struct timing {
	uint64_t resolution; /* nanoseconds; 0: as they are */
	uint64_t key[2];
	bool jitter;
	uint64_t bucket, cut; /* of the last moment: many are in the same bucket */
};

static const struct header_part HEADER_PARTS[] = {
	{"boot_ns", offsetof(struct header, boot_ns), 8},
	{"seq", offsetof(struct header, seq), 8},
	{"size", offsetof(struct header, size), 4},
	{"kind", offsetof(struct header, kind), 2},
	{"cpu", offsetof(struct header, cpu), 2},
	{"skipped", offsetof(struct header, skipped), 1},
	{"cut", offsetof(struct header, cut), 1},
};

typedef struct {
	PyObject_HEAD
	struct header header;
	int64_t clock_offset_ns;
	uint64_t unknown_kind, short_record, invalid_utf8, truncated, incomplete;
	struct plan **plans; /* by kind number; NULL where there is none */
	uint32_t plan_count;
	uint64_t *drained; /* events out of buffers, per CPU and kind number */
	uint32_t cpus;     /* for so many CPUs */
	struct caches *caches;
	PyObject *space;     /* " ", which joins an argv */
	uint8_t *id_prefix;  /* with its hyphen */
	size_t id_prefix_size;
	struct second second;
	struct timing timing;
} Decoder;

/* ------------------------------------------------- from layout to plan */

/* An int from `low` to `high`, or -1 with an exception. */
static int64_t int_from(PyObject *number, int64_t low, int64_t high, const char *what,
			PyObject *where)
{
	int overflow;
	long long value = PyLong_AsLongLongAndOverflow(number, &overflow);
	if (value == -1 && PyErr_Occurred())
		return -1;
	if (overflow != 0 || value < low || value > high) {
		PyErr_Format(PyExc_ValueError, "%U: %s is %R, not %lld to %lld", where, what, number,
			     (long long)low, (long long)high);
		return -1;
	}
	return value;
}

static int header_from(struct header *header, PyObject *offsets)
{
	int result = -1;
	PyObject *where = PyUnicode_FromString("header");
	PyObject *number = NULL;
	if (where == NULL)
		return -1;
	number = PyMapping_GetItemString(offsets, "header_size");
	if (number == NULL)
		goto done;
	int64_t total = int_from(number, 0, MAX_RECORD, "header_size", where);
	if (total < 0)
		goto done;
	header->total = (uint32_t)total;
	for (size_t i = 0; i < Py_ARRAY_LENGTH(HEADER_PARTS); i++) {
		const struct header_part *part = &HEADER_PARTS[i];
		Py_XSETREF(number, PyMapping_GetItemString(offsets, part->name));
		if (number == NULL)
			goto done;
		int64_t offset = int_from(number, 0, (int64_t)total - part->width, part->name, where);
		if (offset < 0)
			goto done;
		memcpy((char *)header + part->member, &(uint32_t){(uint32_t)offset}, 4);
	}
	result = 0;
done:
	Py_XDECREF(number);
	Py_DECREF(where);
	return result;
}

static const struct op_spec *spec_of(PyObject *name, PyObject *where)
{
	for (size_t i = 0; PyUnicode_Check(name) && i < Py_ARRAY_LENGTH(OP_SPECS); i++) {
		if (PyUnicode_CompareWithASCIIString(name, OP_SPECS[i].name) == 0)
			return &OP_SPECS[i];
	}
	PyErr_Format(PyExc_ValueError, "%U: unknown op %R", where, name);
	return NULL;
}

static int names_check(PyObject *names, Py_ssize_t least, PyObject *where)
{
	bool fits = PyTuple_Check(names) && PyTuple_GET_SIZE(names) >= least;
	for (Py_ssize_t i = 0; fits && i < PyTuple_GET_SIZE(names); i++)
		fits = PyUnicode_Check(PyTuple_GET_ITEM(names, i));
	if (!fits)
		PyErr_Format(PyExc_ValueError, "%U: names are %R, not a tuple of str", where, names);
	return fits ? 0 : -1;
}

/* Those of the names whose bit is set in `mask`. */
static PyObject *chosen_names(PyObject *names, uint32_t mask)
{
	PyObject *chosen = PyTuple_New(__builtin_popcount(mask));
	Py_ssize_t next = 0;
	for (Py_ssize_t i = 0; chosen != NULL && i < PyTuple_GET_SIZE(names); i++) {
		if (mask >> i & 1)
			PyTuple_SET_ITEM(chosen, next++, Py_NewRef(PyTuple_GET_ITEM(names, i)));
	}
	return chosen;
}

/* All tuples that `cut` can give, by mask, so that an event costs no allocation. */
static int choices_from(struct op *op, PyObject *names, PyObject *where)
{
	if (names_check(names, 0, where) < 0)
		return -1;
	if (PyTuple_GET_SIZE(names) > MAX_STRINGS) {
		PyErr_Format(PyExc_ValueError, "%U: names are %R, more than %d", where, names,
			     MAX_STRINGS);
		return -1;
	}
	op->argument = (1u << PyTuple_GET_SIZE(names)) - 1;
	op->object = PyTuple_New((Py_ssize_t)op->argument + 1);
	for (uint32_t mask = 0; op->object != NULL && mask <= op->argument; mask++) {
		PyObject *chosen = chosen_names(names, mask);
		if (chosen == NULL)
			Py_CLEAR(op->object);
		else
			PyTuple_SET_ITEM(op->object, mask, chosen);
	}
	return op->object == NULL ? -1 : 0;
}

/* Where the Struct keeps a field, or -1 with an exception. */
static Py_ssize_t slot_of(PyTypeObject *type, PyObject *name, PyObject *where)
{
	PyObject *member = PyObject_GetAttr((PyObject *)type, name);
	if (member == NULL)
		return -1;
	Py_ssize_t slot = -1;
	if (Py_IS_TYPE(member, &PyMemberDescr_Type) &&
	    PyType_IsSubtype(type, PyDescr_TYPE(member))) {
		const PyMemberDef *def = ((PyMemberDescrObject *)member)->d_member;
		if (def->type == T_OBJECT_EX && def->offset >= (Py_ssize_t)sizeof(PyObject) &&
		    def->offset % (Py_ssize_t)sizeof(PyObject *) == 0 &&
		    def->offset + (Py_ssize_t)sizeof(PyObject *) <= type->tp_basicsize)
			slot = def->offset;
	}
	if (slot < 0)
		PyErr_Format(PyExc_TypeError, "%U: %R is not a slot of the Struct", where, member);
	Py_DECREF(member);
	return slot;
}

/* A slot set twice would leak, and leave another one unset. */
static int slot_check(const struct plan *plan, const struct op *op, PyObject *where)
{
	for (const struct op *other = plan->ops; other < op; other++) {
		if (other->slot == op->slot) {
			PyErr_Format(PyExc_TypeError, "%U: shares its slot", where);
			return -1;
		}
	}
	return 0;
}

/* What an op reads must lie within the fixed part of the record. */
static int64_t offset_from(PyObject *offset, uint32_t width, uint32_t size, PyObject *where)
{
	return int_from(offset, 0, (int64_t)size - width, "offset", where);
}

static int argument_from(struct op *op, PyObject *argument, uint32_t size, PyObject *constants,
			 PyObject *where)
{
	int64_t number = 0;
	switch (op->code) {
	case OP_CSTR:
		number = int_from(argument, 1, size, "length", where);
		break;
	case OP_COUNTS:
		number = int_from(argument, 1, size / 4, "count", where);
		break;
	case OP_IP:
		number = offset_from(argument, 1, size, where);
		break;
	case OP_FLAG:
		number = int_from(argument, 1, UINT8_MAX, "mask", where);
		break;
	case OP_NAMES:
		op->object = Py_NewRef(argument);
		return names_check(argument, 1, where);
	case OP_CUT:
		return choices_from(op, argument, where);
	case OP_PART:
		number = int_from(argument, 1, UINT8_MAX, "index", where);
		break;
	case OP_PARSED:
		if (!PyCallable_Check(argument)) {
			PyErr_Format(PyExc_ValueError, "%U: %R is no function", where, argument);
			return -1;
		}
		op->object = Py_NewRef(argument);
		return 0;
	case OP_CONST:
		op->object = PyObject_GetItem(constants, argument);
		return op->object == NULL ? -1 : 0;
	default:
		break;
	}
	op->argument = (uint32_t)number;
	return number < 0 ? -1 : 0;
}

static int op_from(struct op *op, PyObject *field, const struct plan *plan, PyObject *constants,
		   PyObject *where)
{
	const struct op_spec *spec = spec_of(PyTuple_GET_ITEM(field, 1), where);
	if (spec == NULL)
		return -1;
	op->code = spec->code;
	op->stage = spec->stage;
	if (argument_from(op, PyTuple_GET_ITEM(field, 3), plan->size, constants, where) < 0)
		return -1;
	op->slot = slot_of(plan->type, PyTuple_GET_ITEM(field, 0), where);
	if (op->slot < 0 || slot_check(plan, op, where) < 0)
		return -1;
	uint32_t width = spec->width;
	if (op->code == OP_CSTR || op->code == OP_COUNTS)
		width = op->argument * (op->code == OP_COUNTS ? 4 : 1);
	if (width == 0)
		return 0;
	int64_t offset = offset_from(PyTuple_GET_ITEM(field, 2), width, plan->size, where);
	op->offset = (uint32_t)offset;
	return offset < 0 ? -1 : 0;
}

static bool is_tuple_of(PyObject *object, Py_ssize_t size)
{
	return PyTuple_Check(object) && PyTuple_GET_SIZE(object) == size;
}

static int ops_from(struct plan *plan, PyObject *fields, PyObject *constants)
{
	for (Py_ssize_t i = 0; i < plan->count; i++) {
		PyObject *field = PyTuple_GET_ITEM(fields, i);
		if (!is_tuple_of(field, 4) || !PyUnicode_Check(PyTuple_GET_ITEM(field, 0))) {
			PyErr_Format(PyExc_TypeError, "%U: %R is not a FieldLayout", plan->kind, field);
			return -1;
		}
		PyObject *where = PyUnicode_FromFormat("%U.%U", plan->kind,
						       PyTuple_GET_ITEM(field, 0));
		if (where == NULL)
			return -1;
		int result = op_from(&plan->ops[i], field, plan, constants, where);
		Py_DECREF(where);
		if (result < 0)
			return -1;
	}
	return 0;
}

static void add_string(struct plan *plan, struct op *op)
{
	op->argument = 1u << (plan->string_count & 31);
	plan->strings[plan->string_count++] = op->offset;
}

/* The names of a `cut` are those of the strings, one each, and that of a line. */
static int cuts_check(const struct plan *plan)
{
	uint32_t all = ((1u << plan->string_count) - 1) | plan->line_cut;
	for (Py_ssize_t i = 0; i < plan->count; i++) {
		const struct op *op = &plan->ops[i];
		if (op->code == OP_CUT && op->argument != all) {
			PyErr_Format(PyExc_ValueError, "%U: a cut of %d names and %zd strings",
				     plan->kind, __builtin_popcount(op->argument),
				     plan->string_count);
			return -1;
		}
	}
	return 0;
}

static int strings_from(struct plan *plan)
{
	Py_ssize_t argvs = 0, lines = 0, parsed = 0, parts = 0;
	for (Py_ssize_t i = 0; i < plan->count; i++) {
		struct op *op = &plan->ops[i];
		if (op->code == OP_STR || op->code == OP_ARGV || op->code == OP_PARSED)
			add_string(plan, op);
		argvs += op->code == OP_ARGV;
		lines += op->code == OP_LINE;
		parsed += op->code == OP_PARSED;
		parts += op->code == OP_PART;
	}
	for (Py_ssize_t i = 0; lines > 0 && i < plan->count; i++) {
		if (plan->ops[i].code == OP_ARGV)
			plan->line = plan->ops[i].offset;
	}
	if (lines > 0)
		plan->line_cut = (uint8_t)(1u << (plan->string_count & 31));
	if (parts > 0 && parsed != 1) {
		PyErr_Format(PyExc_ValueError, "%U: parts of %zd parsed", plan->kind, parsed);
		return -1;
	}
	if (lines > 0 && argvs != 1) {
		PyErr_Format(PyExc_ValueError, "%U: a line of %zd argv", plan->kind, argvs);
		return -1;
	}
	if (plan->string_count > MAX_STRINGS) {
		PyErr_Format(PyExc_ValueError, "%U: %zd strings, more than %d", plan->kind,
			     plan->string_count, MAX_STRINGS);
		return -1;
	}
	return cuts_check(plan);
}

/* Where the user and the cgroup are, if it has both. */
static void find_subject(struct plan *plan, PyObject *fields)
{
	int found = 0;
	for (Py_ssize_t i = 0; i < plan->count; i++) {
		PyObject *name = PyTuple_GET_ITEM(PyTuple_GET_ITEM(fields, i), 0);
		const struct op *op = &plan->ops[i];
		if (op->code == OP_U64 && PyUnicode_CompareWithASCIIString(name, "cgroup_id") == 0) {
			plan->cgroup = op->offset;
			found++;
		}
		if (op->code == OP_U32 && PyUnicode_CompareWithASCIIString(name, "uid") == 0) {
			plan->uid = op->offset;
			found++;
		}
	}
	plan->has_subject = found == 2;
}

/* Orders the ops by stage, and within a stage as they are. */
static int sort_ops(struct plan *plan)
{
	struct op *sorted = PyMem_New(struct op, (size_t)plan->count + 1);
	if (sorted == NULL) {
		PyErr_NoMemory();
		return -1;
	}
	Py_ssize_t next = 0;
	for (enum stage stage = STAGE_VALUE; stage < STAGE_END; stage++) {
		for (Py_ssize_t i = 0; i < plan->count; i++) {
			if (plan->ops[i].stage == stage)
				sorted[next++] = plan->ops[i];
		}
	}
	PyMem_Free(plan->ops);
	plan->ops = sorted;
	return 0;
}

/* A true attribute `name` of a Struct's configuration; -1 with an exception. */
static int config_says(PyObject *type, const char *name)
{
	PyObject *config = PyObject_GetAttrString(type, "__struct_config__");
	PyObject *value = config == NULL ? NULL : PyObject_GetAttrString(config, name);
	int result = value == NULL ? -1 : PyObject_IsTrue(value);
	Py_XDECREF(config);
	Py_XDECREF(value);
	return result;
}

static int names_equal(PyObject *type, PyObject *fields)
{
	PyObject *names = PyObject_GetAttrString(type, "__struct_fields__");
	if (names == NULL)
		return -1;
	int equal = is_tuple_of(names, PyTuple_GET_SIZE(fields));
	for (Py_ssize_t i = 0; equal == 1 && i < PyTuple_GET_SIZE(fields); i++) {
		PyObject *field = PyTuple_GET_ITEM(fields, i);
		equal = !PyTuple_Check(field) || PyTuple_GET_SIZE(field) == 0 ?
			0 : PyObject_RichCompareBool(PyTuple_GET_ITEM(field, 0),
						     PyTuple_GET_ITEM(names, i), Py_EQ);
	}
	Py_DECREF(names);
	return equal;
}

/* The events are made without a call of the class, so it must be one that allows that: a Struct
 * with exactly these fields, without __post_init__, and freed as what it was allocated as. */
static int struct_check(PyObject *type, PyObject *fields, PyObject *base, PyObject *kind)
{
	const char *trouble = NULL;
	int is_struct = PyType_Check(type) ? PyObject_IsSubclass(type, base) : 0;
	if (is_struct < 0)
		return -1;
	if (!is_struct) {
		trouble = "not a Struct";
	} else {
		int gc = config_says(type, "gc");
		int equal = gc < 0 ? -1 : names_equal(type, fields);
		if (equal < 0)
			return -1;
		if (gc || PyType_IS_GC((PyTypeObject *)type))
			trouble = "a Struct without gc=False";
		else if (!equal)
			trouble = "a Struct with other fields than the layout";
		else if (PyObject_HasAttrString(type, "__post_init__"))
			trouble = "a Struct with __post_init__";
	}
	if (trouble != NULL)
		PyErr_Format(PyExc_TypeError, "%U: %R is %s", kind, type, trouble);
	return trouble == NULL ? 0 : -1;
}

static int fill_plan(struct plan *plan, PyObject *layout, const struct header *header,
		     PyObject *constants, PyObject *base)
{
	if (!is_tuple_of(layout, 5) || !PyUnicode_Check(PyTuple_GET_ITEM(layout, 0)) ||
	    !PyTuple_Check(PyTuple_GET_ITEM(layout, 4))) {
		PyErr_Format(PyExc_TypeError, "%R is not a RecordLayout", layout);
		return -1;
	}
	PyObject *type = PyTuple_GET_ITEM(layout, 1);
	PyObject *fields = PyTuple_GET_ITEM(layout, 4);
	plan->kind = Py_NewRef(PyTuple_GET_ITEM(layout, 0));
	if (struct_check(type, fields, base, plan->kind) < 0)
		return -1;
	plan->type = (PyTypeObject *)Py_NewRef(type);
	int64_t size = int_from(PyTuple_GET_ITEM(layout, 2), header->total, MAX_RECORD, "size",
				plan->kind);
	if (size < 0)
		return -1;
	plan->size = (uint32_t)size;
	plan->count = PyTuple_GET_SIZE(fields);
	plan->ops = PyMem_Calloc((size_t)plan->count + 1, sizeof(struct op));
	plan->strings = PyMem_Calloc((size_t)plan->count + 1, sizeof(uint32_t));
	if (plan->ops == NULL || plan->strings == NULL) {
		PyErr_NoMemory();
		return -1;
	}
	if (ops_from(plan, fields, constants) < 0 || strings_from(plan) < 0)
		return -1;
	find_subject(plan, fields);
	return sort_ops(plan);
}

static void free_plans(Decoder *self)
{
	struct plan **plans = self->plans;
	uint32_t count = self->plan_count;
	self->plans = NULL;
	self->plan_count = 0;
	for (uint32_t i = 0; i < count; i++)
		free_plan(plans[i]);
	PyMem_Free(plans);
}

static int put_plan(Decoder *self, int64_t kind, struct plan *plan)
{
	if (kind >= self->plan_count) {
		struct plan **plans = PyMem_Realloc(self->plans,
						    ((size_t)kind + 1) * sizeof(*plans));
		if (plans == NULL) {
			PyErr_NoMemory();
			return -1;
		}
		memset(plans + self->plan_count, 0,
		       ((size_t)kind + 1 - self->plan_count) * sizeof(*plans));
		self->plans = plans;
		self->plan_count = (uint32_t)kind + 1;
	}
	free_plan(self->plans[kind]);
	self->plans[kind] = plan;
	return 0;
}

static int add_plan(Decoder *self, PyObject *number, PyObject *layout, PyObject *constants,
		    PyObject *base)
{
	PyObject *where = PyUnicode_FromString("layouts");
	if (where == NULL)
		return -1;
	int64_t kind = int_from(number, 0, UINT16_MAX, "kind", where);
	Py_DECREF(where);
	if (kind < 0)
		return -1;
	struct plan *plan = PyMem_Calloc(1, sizeof(*plan));
	if (plan == NULL) {
		PyErr_NoMemory();
		return -1;
	}
	if (fill_plan(plan, layout, &self->header, constants, base) < 0 ||
	    put_plan(self, kind, plan) < 0) {
		free_plan(plan);
		return -1;
	}
	return 0;
}

static int add_plans(Decoder *self, PyObject *layouts, PyObject *constants)
{
	int result = -1;
	PyObject *base = NULL;
	PyObject *items = PyMapping_Items(layouts);
	PyObject *msgspec = items == NULL ? NULL : PyImport_ImportModule("msgspec");
	if (msgspec == NULL)
		goto done;
	base = PyObject_GetAttrString(msgspec, "Struct");
	if (base == NULL)
		goto done;
	for (Py_ssize_t i = 0; i < PyList_GET_SIZE(items); i++) {
		PyObject *item = PyList_GET_ITEM(items, i);
		if (!is_tuple_of(item, 2)) {
			PyErr_SetString(PyExc_TypeError, "layouts is not a mapping");
			goto done;
		}
		if (add_plan(self, PyTuple_GET_ITEM(item, 0), PyTuple_GET_ITEM(item, 1), constants,
			     base) < 0)
			goto done;
	}
	result = 0;
done:
	Py_XDECREF(base);
	Py_XDECREF(msgspec);
	Py_XDECREF(items);
	return result;
}

/* ------------------------------------------------------------ coarse times */

static inline uint64_t rotated(uint64_t word, int bits)
{
	return word << bits | word >> (64 - bits);
}

static inline void sip_round(uint64_t v[4])
{
	v[0] += v[1];
	v[1] = rotated(v[1], 13) ^ v[0];
	v[0] = rotated(v[0], 32);
	v[2] += v[3];
	v[3] = rotated(v[3], 16) ^ v[2];
	v[0] += v[3];
	v[3] = rotated(v[3], 21) ^ v[0];
	v[2] += v[1];
	v[1] = rotated(v[1], 17) ^ v[2];
	v[2] = rotated(v[2], 32);
}

/* SipHash-2-4 (Aumasson and Bernstein, 2012) of 64-bit words. */
static uint64_t siphash(const uint64_t key[2], const uint64_t *words, size_t count)
{
	uint64_t v[4] = {
		key[0] ^ 0x736F6D6570736575u, key[1] ^ 0x646F72616E646F6Du,
		key[0] ^ 0x6C7967656E657261u, key[1] ^ 0x7465646279746573u,
	};
	for (size_t i = 0; i <= count; i++) {
		uint64_t word = i < count ? words[i] : (uint64_t)count << 59;
		v[3] ^= word;
		sip_round(v);
		sip_round(v);
		v[0] ^= word;
	}
	v[2] ^= 0xFF;
	for (int i = 0; i < 4; i++)
		sip_round(v);
	return v[0] ^ v[1] ^ v[2] ^ v[3];
}

/* What is hashed, so that no two uses draw the same. */
enum drawn { DRAWN_MOMENT, DRAWN_START, DRAWN_DURATION };

static uint64_t coarse_moment(struct timing *timing, uint64_t ns)
{
	uint64_t bucket = ns / timing->resolution, rest = ns % timing->resolution;
	if (timing->jitter && timing->bucket != bucket) {
		const uint64_t words[] = {DRAWN_MOMENT, bucket};
		timing->cut = siphash(timing->key, words, 2) % timing->resolution;
		timing->bucket = bucket;
	}
	return (bucket + (timing->jitter && rest > timing->cut)) * timing->resolution;
}

static uint64_t coarse_start(struct timing *timing, uint64_t ns)
{
	if (ns == 0)
		return 0;
	const uint64_t words[] = {DRAWN_START, ns};
	uint64_t moment = coarse_moment(timing, ns);
	uint64_t before = Py_MAX(moment, timing->resolution) - timing->resolution;
	return before + 1 + siphash(timing->key, words, 2) % (timing->resolution - 1);
}

static uint64_t coarse_duration(const struct timing *timing, uint64_t ns, uint64_t cgroup,
				uint32_t uid)
{
	uint64_t bucket = ns / timing->resolution, rest = ns % timing->resolution;
	if (bucket == 0)
		return ns == 0 ? 0 : timing->resolution;
	const uint64_t words[] = {DRAWN_DURATION, bucket, cgroup, uid};
	bool up = timing->jitter && rest > siphash(timing->key, words, 4) % timing->resolution;
	return (bucket + up) * timing->resolution;
}

static inline bool is_coarse(const Decoder *self)
{
	return UNLIKELY(self->timing.resolution != 0);
}

static inline uint64_t moment_of(Decoder *self, uint64_t ns)
{
	return is_coarse(self) ? coarse_moment(&self->timing, ns) : ns;
}

static inline uint64_t start_of(Decoder *self, uint64_t ns)
{
	return is_coarse(self) ? coarse_start(&self->timing, ns) : ns;
}

/* `timing` is a Timing or None. */
static int set_timing(Decoder *self, PyObject *timing)
{
	if (timing == Py_None)
		return 0;
	PyObject *where = PyUnicode_FromString("timing");
	if (where == NULL)
		return -1;
	int64_t resolution = -1;
	if (is_tuple_of(timing, 3) && PyBytes_Check(PyTuple_GET_ITEM(timing, 1)) &&
	    PyBytes_GET_SIZE(PyTuple_GET_ITEM(timing, 1)) == sizeof(self->timing.key))
		resolution = int_from(PyTuple_GET_ITEM(timing, 0), 2, INT64_MAX, "resolution_ns",
				      where);
	else
		PyErr_Format(PyExc_ValueError, "%U: not a Timing with a key of 16 bytes", where);
	Py_DECREF(where);
	int jitter = resolution < 0 ? -1 : PyObject_IsTrue(PyTuple_GET_ITEM(timing, 2));
	if (jitter < 0)
		return -1;
	self->timing.resolution = (uint64_t)resolution;
	memcpy(self->timing.key, PyBytes_AS_STRING(PyTuple_GET_ITEM(timing, 1)),
	       sizeof(self->timing.key));
	self->timing.jitter = jitter;
	self->timing.bucket = UINT64_MAX; /* which none is, of a resolution from 2 on */
	return 0;
}

/* --------------------------------------------------------------- decoding */

/* What decoding a record found out. Committed by the caller, once the event is safe. */
struct outcome {
	struct plan *plan; /* set when the record became an event */
	bool unknown_kind, short_record, invalid_utf8, truncated, incomplete;
};

/* What is carried from one op to the next. */
struct cursor {
	const struct plan *plan;
	const uint8_t *record;
	const uint8_t *data;  /* the next string */
	const uint8_t *argv;
	size_t argv_size;
	PyObject *argv_list;  /* borrowed from the event */
	PyObject *parsed;     /* a tuple, or NULL */
	uint8_t cut;          /* a bit per string */
	uint8_t line_cut;     /* the plan's, if the line was cut */
};

static uint8_t *put_digits(uint8_t *end, uint64_t number)
{
	do {
		*--end = (uint8_t)('0' + number % 10);
		number /= 10;
	} while (number != 0);
	return end;
}

static PyObject *id_of(const Decoder *self, const uint8_t *record)
{
	uint8_t digits[32];
	uint8_t *end = digits + sizeof(digits);
	uint8_t *start = put_digits(end, load64(record + self->header.seq));
	*--start = '-';
	start = put_digits(start, load16(record + self->header.cpu));
	size_t size = (size_t)(end - start);
	PyObject *text = PyUnicode_New((Py_ssize_t)(self->id_prefix_size + size), 127);
	if (text != NULL) {
		uint8_t *to = PyUnicode_1BYTE_DATA(text);
		memcpy(to, self->id_prefix, self->id_prefix_size);
		memcpy(to + self->id_prefix_size, start, size);
	}
	return text;
}

/* The largest u64 of nanoseconds is of the year 2554, so that a year has four digits. */
static PyObject *rfc3339_of(struct second *second, uint64_t ns)
{
	uint64_t number = ns / NS_PER_SECOND;
	if (second->number != number || second->text[0] == 0) {
		time_t time = (time_t)number;
		struct tm tm;
		char text[sizeof(second->text) + 1];
		if (gmtime_r(&time, &tm) == NULL ||
		    strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%S.", &tm) != sizeof(second->text)) {
			PyErr_SetString(PyExc_OverflowError, "time beyond the calendar");
			return NULL;
		}
		memcpy(second->text, text, sizeof(second->text));
		second->number = number;
	}
	PyObject *text = PyUnicode_New(sizeof(second->text) + 10, 127);
	if (text == NULL)
		return NULL;
	uint8_t *to = PyUnicode_1BYTE_DATA(text);
	memcpy(to, second->text, sizeof(second->text));
	uint32_t rest = (uint32_t)(ns % NS_PER_SECOND);
	for (int i = 8; i >= 0; i--, rest /= 10)
		to[sizeof(second->text) + i] = (uint8_t)('0' + rest % 10);
	to[sizeof(second->text) + 9] = 'Z';
	return text;
}

/* The last argument, and only that, may have been cut, unless its NUL is there. */
static PyObject *argv_of(struct caches *caches, const uint8_t *at, size_t size, bool is_cut,
			 bool *invalid)
{
	PyObject *list = PyList_New(0);
	while (list != NULL && size > 0) {
		const uint8_t *nul = memchr(at, 0, size);
		size_t length = nul == NULL ? size : (size_t)(nul - at);
		size_t step = nul == NULL ? size : length + 1;
		enum cut cut = nul == NULL && is_cut ? CUT_END : WHOLE;
		PyObject *text = str_of(caches, at, length, cut, invalid);
		if (text == NULL || PyList_Append(list, text) < 0)
			Py_CLEAR(list);
		Py_XDECREF(text);
		at += step;
		size -= step;
	}
	return list;
}

static PyObject *cut_line_of(const Decoder *self, const struct cursor *cursor)
{
	bool told = false; /* of the argv */
	PyObject *words = argv_of(self->caches, cursor->argv, MAX_LINE, true, &told);
	PyObject *text = words == NULL ? NULL : PyUnicode_Join(self->space, words);
	Py_XDECREF(words);
	return text;
}

static PyObject *line_of(const Decoder *self, const struct cursor *cursor)
{
	size_t size = cursor->argv_size;
	if (size > MAX_LINE)
		return cut_line_of(self, cursor);
	if (!is_ascii(cursor->argv, size))
		return PyUnicode_Join(self->space, cursor->argv_list);
	if (size > 0 && cursor->argv[size - 1] == 0)
		size--;
	PyObject *text = ascii_from(cursor->argv, size);
	if (text == NULL)
		return NULL;
	uint8_t *at = PyUnicode_1BYTE_DATA(text);
	for (size_t i = 0; i < size; i++) {
		if (at[i] == 0)
			at[i] = ' ';
	}
	return text;
}

static inline PyObject *cstr_of(struct caches *caches, const uint8_t *at, size_t size,
				bool *invalid)
{
	const uint8_t *nul = memchr(at, 0, size);
	return str_of(caches, at, nul == NULL ? size : (size_t)(nul - at), WHOLE, invalid);
}

static inline PyObject *name_of(PyObject *names, uint8_t index)
{
	return Py_NewRef(PyTuple_GET_ITEM(names, index < PyTuple_GET_SIZE(names) ? index : 0));
}

static PyObject *counts_of(struct caches *caches, const uint8_t *at, uint32_t count)
{
	PyObject *counts = PyTuple_New(count);
	for (uint32_t i = 0; counts != NULL && i < count; i++) {
		PyObject *one = int_of(caches, load32(at + 4 * i));
		if (one == NULL)
			Py_CLEAR(counts);
		else
			PyTuple_SET_ITEM(counts, i, one);
	}
	return counts;
}

static PyObject *next_argv(Decoder *self, const struct op *op, struct cursor *cursor,
			   bool *invalid)
{
	cursor->argv = cursor->data;
	cursor->argv_size = load16(cursor->record + op->offset);
	cursor->data += cursor->argv_size;
	cursor->argv_list = argv_of(self->caches, cursor->argv, cursor->argv_size,
				    cursor->cut & op->argument, invalid);
	return cursor->argv_list;
}

static inline PyObject *next_str(Decoder *self, const struct op *op, struct cursor *cursor,
				 bool *invalid)
{
	const uint8_t *at = cursor->data;
	size_t size = load16(cursor->record + op->offset);
	enum cut cut = cursor->cut & op->argument ? CUT_ANYWHERE : WHOLE;
	cursor->data += size;
	return str_of(self->caches, at, size, cut, invalid);
}

static PyObject *part_of(const struct cursor *cursor, Py_ssize_t index)
{
	if (!PyTuple_Check(cursor->parsed) || index >= PyTuple_GET_SIZE(cursor->parsed)) {
		PyErr_Format(PyExc_TypeError, "part %zd of %R", index, cursor->parsed);
		return NULL;
	}
	return Py_NewRef(PyTuple_GET_ITEM(cursor->parsed, index));
}

static PyObject *next_parsed(const struct op *op, struct cursor *cursor)
{
	size_t size = load16(cursor->record + op->offset);
	PyObject *cut = cursor->cut & op->argument ? Py_True : Py_False;
	PyObject *data = PyBytes_FromStringAndSize((const char *)cursor->data, (Py_ssize_t)size);
	if (data == NULL)
		return NULL;
	cursor->data += size;
	Py_XSETREF(cursor->parsed, PyObject_CallFunctionObjArgs(op->object, data, cut, NULL));
	Py_DECREF(data);
	return cursor->parsed == NULL ? NULL : part_of(cursor, 0);
}

static inline PyObject *cut_names(const struct op *op, uint8_t bits, struct outcome *outcome)
{
	uint32_t mask = bits & op->argument;
	outcome->truncated |= mask != 0;
	return Py_NewRef(PyTuple_GET_ITEM(op->object, mask));
}

static uint64_t duration_of(const Decoder *self, const struct cursor *cursor, uint64_t ns)
{
	const struct plan *plan = cursor->plan;
	if (!is_coarse(self))
		return ns;
	if (!plan->has_subject)
		return coarse_duration(&self->timing, ns, 0, 0);
	return coarse_duration(&self->timing, ns, load64(cursor->record + plan->cgroup),
			       load32(cursor->record + plan->uid));
}

static inline uint64_t event_moment(Decoder *self, const struct cursor *cursor)
{
	return moment_of(self, load64(cursor->record + self->header.boot_ns));
}

static inline PyObject *op_value(Decoder *self, const struct op *op, struct cursor *cursor,
				 struct outcome *outcome)
{
	struct caches *caches = self->caches;
	bool *invalid = &outcome->invalid_utf8;
	const uint8_t *at = cursor->record + op->offset;
	uint64_t clock = (uint64_t)self->clock_offset_ns;
	bool flag;

	switch (op->code) {
	case OP_U8:
		return int_of(caches, *at);
	case OP_U16:
		return int_of(caches, load16(at));
	case OP_U32:
		return int_of(caches, load32(at));
	case OP_U64:
		return int_of(caches, load64(at));
	case OP_S32:
		return signed_of(caches, (int32_t)load32(at));
	case OP_S64:
		return PyLong_FromLongLong((int64_t)load64(at));
	case OP_NS:
		return PyLong_FromUnsignedLongLong(duration_of(self, cursor, load64(at)));
	case OP_MOMENT:
		return PyLong_FromUnsignedLongLong(moment_of(self, load64(at)));
	case OP_START:
		return int_of(caches, start_of(self, load64(at)));
	case OP_SERIAL:
		return PyLong_FromUnsignedLongLong(load64(at));
	case OP_BOOL:
		return Py_NewRef(*at != 0 ? Py_True : Py_False);
	case OP_CSTR:
		return cstr_of(caches, at, op->argument, invalid);
	case OP_COUNTS:
		return counts_of(caches, at, op->argument);
	case OP_IP:
		return ip_of(caches, at, cursor->record[op->argument]);
	case OP_NAMES:
		return name_of(op->object, *at);
	case OP_STR:
		return next_str(self, op, cursor, invalid);
	case OP_ARGV:
		return next_argv(self, op, cursor, invalid);
	case OP_LINE:
		return line_of(self, cursor);
	case OP_PARSED:
		return next_parsed(op, cursor);
	case OP_PART:
		return part_of(cursor, op->argument);
	case OP_CONST:
		return Py_NewRef(op->object);
	case OP_ID:
		return id_of(self, cursor->record);
	case OP_TIME:
		return PyLong_FromUnsignedLongLong(event_moment(self, cursor) + clock);
	case OP_BOOTTIME:
		return PyLong_FromUnsignedLongLong(start_of(self, load64(at)) + clock);
	case OP_RFC3339:
		return rfc3339_of(&self->second, event_moment(self, cursor) + clock);
	case OP_CUT:
		return cut_names(op, cursor->line_cut | (*at & ~cursor->plan->line_cut), outcome);
	case OP_FLAG:
		flag = (*at & op->argument) != 0;
		outcome->incomplete |= flag;
		return Py_NewRef(flag ? Py_True : Py_False);
	case OP_INVALID_UTF8:
		return Py_NewRef(*invalid ? Py_True : Py_False);
	}
	Py_UNREACHABLE();
}

static PyObject *build(Decoder *self, const struct plan *plan, const uint8_t *record,
		       struct outcome *outcome)
{
	struct cursor cursor = {
		.plan = plan,
		.record = record,
		.data = record + plan->size,
		.cut = record[self->header.cut],
	};
	if (plan->line_cut && load16(record + plan->line) > MAX_LINE)
		cursor.line_cut = plan->line_cut;
	PyObject *event = plan->type->tp_alloc(plan->type, 0);
	if (event == NULL)
		return NULL;
	for (const struct op *op = plan->ops, *end = op + plan->count; op < end; op++) {
		PyObject *value = op_value(self, op, &cursor, outcome);
		if (UNLIKELY(value == NULL)) {
			Py_CLEAR(event);
			break;
		}
		memcpy((char *)event + op->slot, &value, sizeof(value));
	}
	Py_XDECREF(cursor.parsed);
	return event;
}

static bool strings_fit(const struct plan *plan, const uint8_t *record, size_t size)
{
	uint64_t end = plan->size;
	for (Py_ssize_t i = 0; i < plan->string_count; i++)
		end += load16(record + plan->strings[i]);
	return end <= size;
}

/* An event; or NULL without an exception, and `outcome` says why; or NULL with an exception. */
static PyObject *decode_record(Decoder *self, const uint8_t *record, size_t length,
			       struct outcome *outcome)
{
	if (length < self->header.total) {
		outcome->short_record = true;
		return NULL;
	}
	uint16_t kind = load16(record + self->header.kind);
	struct plan *plan = kind < self->plan_count ? self->plans[kind] : NULL;
	if (plan == NULL) {
		outcome->unknown_kind = true;
		return NULL;
	}
	/* The base can claim less than the ring holds (a whole buffer was reserved), and what it
	 * claims beyond that does not exist. */
	size_t size = Py_MIN(length, load32(record + self->header.size));
	if (size < plan->size || !strings_fit(plan, record, size)) {
		outcome->short_record = true;
		return NULL;
	}
	outcome->plan = plan;
	return build(self, plan, record, outcome);
}

static void commit_outcome(Decoder *self, const struct outcome *outcome)
{
	self->unknown_kind += outcome->unknown_kind;
	self->short_record += outcome->short_record;
	self->invalid_utf8 += outcome->invalid_utf8;
	self->truncated += outcome->truncated;
	self->incomplete += outcome->incomplete;
}

/* ---------------------------------------------------------------- Decoder */

static int set_id_prefix(Decoder *self, PyObject *prefix)
{
	if (!PyUnicode_IS_ASCII(prefix)) {
		PyErr_Format(PyExc_ValueError, "id_prefix %R is not ASCII", prefix);
		return -1;
	}
	size_t size = (size_t)PyUnicode_GET_LENGTH(prefix);
	self->id_prefix = PyMem_Malloc(size + 1);
	if (self->id_prefix == NULL) {
		PyErr_NoMemory();
		return -1;
	}
	memcpy(self->id_prefix, PyUnicode_1BYTE_DATA(prefix), size);
	self->id_prefix[size] = '-';
	self->id_prefix_size = size + 1;
	return 0;
}

static int fill_decoder(Decoder *self, PyObject *header, PyObject *layouts, PyObject *constants,
			PyObject *prefix)
{
	if (header_from(&self->header, header) < 0 || set_id_prefix(self, prefix) < 0)
		return -1;
	self->space = PyUnicode_FromString(" ");
	if (self->space == NULL)
		return -1;
	self->caches = PyMem_Calloc(1, sizeof(*self->caches));
	if (self->caches == NULL) {
		PyErr_NoMemory();
		return -1;
	}
	return add_plans(self, layouts, constants);
}

/* All in tp_new and nothing in tp_init, so that no second call changes plans that are in use. */
static PyObject *decoder_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"header", "layouts", "constants", "id_prefix", "timing", NULL};
	PyObject *header, *layouts, *constants, *prefix, *timing = Py_None;
	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOU|O:Decoder", names, &header, &layouts,
					 &constants, &prefix, &timing))
		return NULL;
	Decoder *self = (Decoder *)type->tp_alloc(type, 0);
	if (self != NULL && (set_timing(self, timing) < 0 ||
			     fill_decoder(self, header, layouts, constants, prefix) < 0))
		Py_CLEAR(self);
	return (PyObject *)self;
}

static int decoder_traverse(Decoder *self, visitproc visit, void *arg)
{
	Py_VISIT(Py_TYPE(self));
	for (uint32_t i = 0; i < self->plan_count; i++) {
		const struct plan *plan = self->plans[i];
		if (plan == NULL)
			continue;
		Py_VISIT(plan->type);
		for (Py_ssize_t j = 0; j < plan->count; j++)
			Py_VISIT(plan->ops[j].object);
	}
	return 0;
}

static int decoder_clear(Decoder *self)
{
	free_plans(self);
	return 0;
}

static void decoder_dealloc(Decoder *self)
{
	PyTypeObject *type = Py_TYPE(self);
	PyObject_GC_UnTrack(self);
	free_plans(self);
	free_caches(self->caches);
	PyMem_Free(self->drained);
	Py_XDECREF(self->space);
	PyMem_Free(self->id_prefix);
	type->tp_free(self);
	Py_DECREF(type);
}

static PyObject *decoder_decode(Decoder *self, PyObject *record)
{
	Py_buffer view;
	if (PyObject_GetBuffer(record, &view, PyBUF_SIMPLE) < 0)
		return NULL;
	struct outcome outcome = {0};
	PyObject *event = decode_record(self, view.buf, (size_t)view.len, &outcome);
	PyBuffer_Release(&view);
	if (event == NULL && PyErr_Occurred())
		return NULL;
	commit_outcome(self, &outcome);
	return event != NULL ? event : Py_NewRef(Py_None);
}

static PyObject *get_clock_offset(Decoder *self, void *Py_UNUSED(closure))
{
	return PyLong_FromLongLong(self->clock_offset_ns);
}

static int set_clock_offset(Decoder *self, PyObject *value, void *Py_UNUSED(closure))
{
	if (value == NULL) {
		PyErr_SetString(PyExc_AttributeError, "clock_offset_ns cannot be deleted");
		return -1;
	}
	long long number = PyLong_AsLongLong(value);
	if (number == -1 && PyErr_Occurred())
		return -1;
	self->clock_offset_ns = number;
	return 0;
}

/* A number of a CPU, or -1 with an exception. */
static long cpu_from(PyObject *number)
{
	long cpu = PyLong_AsLong(number);
	if (cpu == -1 && PyErr_Occurred())
		return -1;
	if (cpu < 0 || cpu >= CPUS) {
		PyErr_Format(PyExc_ValueError, "cpu is %ld, not 0 to %d", cpu, CPUS - 1);
		return -1;
	}
	return cpu;
}

/* Room for `cpu` in what is kept per CPU: so many are to have it. */
static uint32_t cpus_with(uint32_t cpus, uint16_t cpu)
{
	cpus = cpus == 0 ? 8 : cpus;
	while (cpus <= cpu)
		cpus *= 2;
	return cpus;
}

/* The count of events of a kind of `cpu` that came out of buffers; NULL with an exception. */
static uint64_t *drained_of(Decoder *self, uint16_t cpu, uint16_t kind)
{
	size_t width = self->plan_count;
	if (UNLIKELY(cpu >= self->cpus)) {
		uint32_t cpus = cpus_with(self->cpus, cpu);
		uint64_t *drained = PyMem_Realloc(self->drained, cpus * width * sizeof(*drained));
		if (drained == NULL) {
			PyErr_NoMemory();
			return NULL;
		}
		memset(drained + self->cpus * width, 0,
		       (cpus - self->cpus) * width * sizeof(*drained));
		self->drained = drained;
		self->cpus = cpus;
	}
	return &self->drained[cpu * width + kind];
}

static int set_count(PyObject *kinds, PyObject *kind, uint64_t count)
{
	PyObject *number = PyLong_FromUnsignedLongLong(count);
	if (number == NULL)
		return -1;
	int result = PyDict_SetItem(kinds, kind, number);
	Py_DECREF(number);
	return result;
}

static PyObject *decoder_drained(Decoder *self, PyObject *number)
{
	long cpu = cpu_from(number);
	PyObject *kinds = cpu < 0 ? NULL : PyDict_New();
	if (kinds == NULL || cpu >= self->cpus)
		return kinds;
	const uint64_t *drained = self->drained + (size_t)cpu * self->plan_count;
	for (uint32_t i = 0; kinds != NULL && i < self->plan_count; i++) {
		if (drained[i] > 0 && set_count(kinds, self->plans[i]->kind, drained[i]) < 0)
			Py_CLEAR(kinds);
	}
	return kinds;
}

static PyMethodDef decoder_methods[] = {
	{"decode", (PyCFunction)decoder_decode, METH_O, PyDoc_STR(
		"decode(record)\n--\n\n"
		"The event of one record; None when it was refused, which is counted.")},
	{"drained", (PyCFunction)decoder_drained, METH_O, PyDoc_STR(
		"drained(cpu, /)\n--\n\n"
		"How many events of a CPU came out of buffers so far, per dotted kind.")},
	{NULL, NULL, 0, NULL},
};

static PyGetSetDef decoder_getset[] = {
	{"clock_offset_ns", (getter)get_clock_offset, (setter)set_clock_offset,
	 PyDoc_STR("nanoseconds to add to time since boot to get time since the epoch"), NULL},
	{NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef decoder_members[] = {
	{"unknown_kind", T_ULONGLONG, offsetof(Decoder, unknown_kind), READONLY,
	 PyDoc_STR("records refused because no layout has their kind")},
	{"short_record", T_ULONGLONG, offsetof(Decoder, short_record), READONLY,
	 PyDoc_STR("records refused because they end before their fields do")},
	{"invalid_utf8", T_ULONGLONG, offsetof(Decoder, invalid_utf8), READONLY,
	 PyDoc_STR("events with a string in which U+FFFD replaced bytes")},
	{"truncated", T_ULONGLONG, offsetof(Decoder, truncated), READONLY,
	 PyDoc_STR("events with a string that was cut")},
	{"incomplete", T_ULONGLONG, offsetof(Decoder, incomplete), READONLY,
	 PyDoc_STR("events with a flag set")},
	{NULL, 0, 0, 0, NULL},
};

static PyType_Slot decoder_slots[] = {
	{Py_tp_doc, (void *)PyDoc_STR(
		"Decoder(header, layouts, constants, id_prefix, timing=None)\n--\n\n"
		"Makes Structs of records, as the layouts say.")},
	{Py_tp_new, decoder_new},
	{Py_tp_dealloc, decoder_dealloc},
	{Py_tp_traverse, decoder_traverse},
	{Py_tp_clear, decoder_clear},
	{Py_tp_methods, decoder_methods},
	{Py_tp_getset, decoder_getset},
	{Py_tp_members, decoder_members},
	{0, NULL},
};

static PyType_Spec decoder_spec = {
	.name = "streamer.ring._records.Decoder",
	.basicsize = sizeof(Decoder),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
	.slots = decoder_slots,
};

/* --------------------------------------------------------------- Consumer */

struct state {
	PyTypeObject *decoder, *ring, *perf_buffers, *drained;
	PyObject *missing, *late, *skipped; /* the words for anomalies */
};

/* What Ring and PerfBuffers have in common: what becomes of a record. */
typedef struct {
	PyObject_HEAD
	uint64_t records, discarded;
	uint64_t *last_seq; /* per CPU; 0 before the first */
	uint32_t cpus;      /* length of last_seq */
	bool draining;
	PyObject *events, *gaps; /* of a drain whose result could not be made, for the next one */
} Consumer;

enum stop { STOP_EMPTY, STOP_BUSY, STOP_LIMIT };

/* Makes room for the sequence of `cpu`. */
static uint64_t *last_seq_of(Consumer *self, uint16_t cpu)
{
	if (UNLIKELY(cpu >= self->cpus)) {
		uint32_t cpus = cpus_with(self->cpus, cpu);
		uint64_t *last = PyMem_Realloc(self->last_seq, cpus * sizeof(*last));
		if (last == NULL) {
			PyErr_NoMemory();
			return NULL;
		}
		memset(last + self->cpus, 0, (cpus - self->cpus) * sizeof(*last));
		self->last_seq = last;
		self->cpus = cpus;
	}
	return &self->last_seq[cpu];
}

static int add_gap(PyObject *gaps, PyObject *what, uint16_t cpu, uint64_t first, uint64_t last)
{
	PyObject *gap = Py_BuildValue("(OHKK)", what, cpu, (unsigned long long)first,
				      (unsigned long long)last);
	if (gap == NULL)
		return -1;
	int result = PyList_Append(gaps, gap);
	Py_DECREF(gap);
	return result;
}

static int add_gaps(const struct state *state, PyObject *gaps, uint16_t cpu, uint64_t seq,
		    uint64_t expected, uint8_t skipped)
{
	if (seq > expected && add_gap(gaps, state->missing, cpu, expected, seq - 1) < 0)
		return -1;
	if (seq < expected && add_gap(gaps, state->late, cpu, seq, seq) < 0)
		return -1;
	if (skipped > 0 && add_gap(gaps, state->skipped, cpu, skipped, skipped) < 0)
		return -1;
	return 0;
}

/* Follows the sequence. `commit` is where the CPU's last number belongs once all has succeeded. */
static int follow(Consumer *self, const struct state *state, const struct header *header,
		  const uint8_t *record, uint64_t **commit)
{
	uint16_t cpu = load16(record + header->cpu);
	uint8_t skipped = record[header->skipped];
	uint64_t seq = load64(record + header->seq);
	uint64_t *last = last_seq_of(self, cpu);
	if (UNLIKELY(last == NULL))
		return -1;
	uint64_t expected = *last + 1;
	if (LIKELY(seq >= expected))
		*commit = last;
	if (LIKELY(seq == expected && skipped == 0))
		return 0;
	return add_gaps(state, self->gaps, cpu, seq, expected, skipped);
}

/* One record into `events` and `gaps`; -1 with an exception and nothing changed. */
static int take(Consumer *self, const struct state *state, Decoder *decoder,
		const uint8_t *record, size_t length)
{
	struct outcome outcome = {0};
	uint64_t *last = NULL, *drained = NULL;
	Py_ssize_t gaps = PyList_GET_SIZE(self->gaps);
	PyObject *event = decode_record(decoder, record, length, &outcome);
	if (event == NULL && PyErr_Occurred())
		return -1;
	if (event != NULL) {
		drained = drained_of(decoder, load16(record + decoder->header.cpu),
				     load16(record + decoder->header.kind));
		if (UNLIKELY(drained == NULL))
			goto undo;
	}
	if (LIKELY(length >= decoder->header.total) &&
	    follow(self, state, &decoder->header, record, &last) < 0)
		goto undo;
	if (event != NULL && PyList_Append(self->events, event) < 0)
		goto undo;
	if (last != NULL)
		*last = load64(record + decoder->header.seq);
	if (event != NULL) {
		outcome.plan->decoded++;
		(*drained)++;
	}
	commit_outcome(decoder, &outcome);
	self->records++;
	Py_XDECREF(event);
	return 0;
undo:
	Py_XDECREF(event);
	PyObject *type, *value, *traceback;
	PyErr_Fetch(&type, &value, &traceback);
	if (PyList_SetSlice(self->gaps, gaps, PY_SSIZE_T_MAX, NULL) < 0)
		PyErr_Clear();
	PyErr_Restore(type, value, traceback);
	return -1;
}

static PyObject *kinds_of(const Decoder *decoder)
{
	PyObject *kinds = PyDict_New();
	for (uint32_t i = 0; kinds != NULL && i < decoder->plan_count; i++) {
		const struct plan *plan = decoder->plans[i];
		if (plan != NULL && plan->decoded > 0 &&
		    set_count(kinds, plan->kind, plan->decoded) < 0)
			Py_CLEAR(kinds);
	}
	return kinds;
}

static void forget_kinds(Decoder *decoder)
{
	for (uint32_t i = 0; i < decoder->plan_count; i++) {
		if (decoder->plans[i] != NULL)
			decoder->plans[i]->decoded = 0;
	}
}

/* Hands over what was drained. When this fails, all of it stays for the next drain. */
static PyObject *hand_over(Consumer *self, const struct state *state, Decoder *decoder,
			   enum stop stop)
{
	PyObject *kinds = kinds_of(decoder);
	PyObject *gaps = kinds == NULL ? NULL : PyList_AsTuple(self->gaps);
	PyObject *drained = gaps == NULL ? NULL : PyStructSequence_New(state->drained);
	if (drained == NULL) {
		Py_XDECREF(kinds);
		Py_XDECREF(gaps);
		return NULL;
	}
	PyStructSequence_SetItem(drained, 0, self->events);
	PyStructSequence_SetItem(drained, 1, kinds);
	PyStructSequence_SetItem(drained, 2, gaps);
	PyStructSequence_SetItem(drained, 3, Py_NewRef(stop == STOP_LIMIT ? Py_True : Py_False));
	PyStructSequence_SetItem(drained, 4, Py_NewRef(stop == STOP_BUSY ? Py_True : Py_False));
	self->events = NULL;
	if (PyList_GET_SIZE(self->gaps) > 0)
		Py_CLEAR(self->gaps);
	forget_kinds(decoder);
	return drained;
}

static int prepare(Consumer *self)
{
	if (self->events == NULL)
		self->events = PyList_New(0);
	if (self->gaps == NULL)
		self->gaps = PyList_New(0);
	return self->events == NULL || self->gaps == NULL ? -1 : 0;
}

/* Consumes up to `limit` records: 0, or -1 with an exception and nothing lost. */
typedef int consume_function(Consumer *self, const struct state *state, Decoder *decoder,
			     Py_ssize_t limit, enum stop *stop);

static PyObject *drain(Consumer *self, PyObject *const *args, Py_ssize_t count,
		       consume_function *consume)
{
	const struct state *state = PyType_GetModuleState(Py_TYPE(self));
	if (count != 2 || !Py_IS_TYPE(args[0], state->decoder)) {
		PyErr_SetString(PyExc_TypeError, "drain() takes a Decoder and a number of records");
		return NULL;
	}
	Py_ssize_t limit = PyLong_AsSsize_t(args[1]);
	if (limit == -1 && PyErr_Occurred())
		return NULL;
	if (limit < 1) {
		PyErr_Format(PyExc_ValueError, "max_records is %zd, not at least 1", limit);
		return NULL;
	}
	/* An allocation can start the garbage collector, and that a finalizer, which must not
	 * change the ring underneath. */
	if (self->draining) {
		PyErr_SetString(PyExc_RuntimeError, "the ring is being drained");
		return NULL;
	}
	Decoder *decoder = (Decoder *)args[0];
	enum stop stop;
	PyObject *drained = NULL;
	self->draining = true;
	if (prepare(self) == 0 && consume(self, state, decoder, limit, &stop) == 0)
		drained = hand_over(self, state, decoder, stop);
	self->draining = false;
	return drained;
}

static PyObject *next_seq(Consumer *self, PyObject *number)
{
	long cpu = cpu_from(number);
	if (cpu < 0)
		return NULL;
	return PyLong_FromUnsignedLongLong((cpu < self->cpus ? self->last_seq[cpu] : 0) + 1);
}

static PyObject *expect(Consumer *self, PyObject *const *args, Py_ssize_t count)
{
	unsigned long long seq;
	uint64_t *last;
	long cpu;

	if (count != 2) {
		PyErr_Format(PyExc_TypeError, "expect() takes 2 arguments, not %zd", count);
		return NULL;
	}
	cpu = cpu_from(args[0]);
	if (cpu < 0)
		return NULL;
	seq = PyLong_AsUnsignedLongLong(args[1]);
	if (seq == (unsigned long long)-1 && PyErr_Occurred())
		return NULL;
	if (seq == 0) {
		PyErr_SetString(PyExc_ValueError, "seq is 0, and numbers begin at 1");
		return NULL;
	}
	last = last_seq_of(self, (uint16_t)cpu);
	if (!last)
		return NULL;
	*last = seq - 1;
	Py_RETURN_NONE;
}

static int shape_error(const char *trouble)
{
	PyErr_SetString(PyExc_ValueError, trouble);
	return -1;
}

static int consumer_traverse(Consumer *self, visitproc visit, void *arg)
{
	Py_VISIT(Py_TYPE(self));
	Py_VISIT(self->events);
	Py_VISIT(self->gaps);
	return 0;
}

static int consumer_clear(Consumer *self)
{
	Py_CLEAR(self->events);
	Py_CLEAR(self->gaps);
	return 0;
}

static void consumer_free(Consumer *self)
{
	PyTypeObject *type = Py_TYPE(self);
	PyMem_Free(self->last_seq);
	type->tp_free(self);
	Py_DECREF(type);
}

/* ------------------------------------------------------------------- Ring */

typedef struct {
	Consumer base;
	Py_buffer consumer, producer; /* .obj is NULL once closed */
	const uint8_t *data;
	uint64_t size, mapped; /* of the data area; with what is there a second time */
} Ring;

static inline uint64_t consumer_position(const Ring *self)
{
	return __atomic_load_n((const uint64_t *)self->consumer.buf, __ATOMIC_RELAXED);
}

static inline uint64_t producer_position(const Ring *self)
{
	return __atomic_load_n((const uint64_t *)self->producer.buf, __ATOMIC_ACQUIRE);
}

static int check_open(const Ring *self)
{
	if (self->consumer.obj != NULL)
		return 0;
	PyErr_SetString(PyExc_ValueError, "the ring is closed");
	return -1;
}

/* Where the data ends; false with an exception when the positions make no sense. */
static bool find_end(const Ring *self, uint64_t position, uint64_t *end)
{
	*end = producer_position(self);
	if (LIKELY(*end - position <= self->size && position % ROUND == 0))
		return true;
	PyErr_Format(PyExc_ValueError,
		     "corrupt ring: consumer at %llu, producer at %llu, size %llu",
		     (unsigned long long)position, (unsigned long long)*end,
		     (unsigned long long)self->size);
	return false;
}

/* Consumes the record at `position`: 1, or 0 when it is busy, or -1 with an exception. */
static int consume(Ring *self, const struct state *state, Decoder *decoder, uint64_t *position,
		   uint64_t end)
{
	uint64_t offset = *position & (self->size - 1);
	const uint8_t *at = self->data + offset;
	uint32_t word = __atomic_load_n((const uint32_t *)at, __ATOMIC_ACQUIRE);
	if (UNLIKELY(word & BUSY_BIT))
		return 0;
	uint32_t length = word & LENGTH_MASK;
	uint64_t step = ((uint64_t)length + RING_HEADER + ROUND - 1) & ~(uint64_t)(ROUND - 1);
	if (UNLIKELY(step > end - *position)) {
		PyErr_Format(PyExc_ValueError,
			     "corrupt ring: a record of %u bytes at %llu, where %llu are pending",
			     length, (unsigned long long)*position,
			     (unsigned long long)(end - *position));
		return -1;
	}
	if (UNLIKELY(offset + step > self->mapped && !(word & DISCARD_BIT))) {
		PyErr_Format(PyExc_ValueError,
			     "corrupt ring: a record of %u bytes at %llu is longer than what is mapped",
			     length, (unsigned long long)*position);
		return -1;
	}
	if (UNLIKELY(word & DISCARD_BIT))
		self->base.discarded++;
	else if (UNLIKELY(take(&self->base, state, decoder, at + RING_HEADER, length) < 0))
		return -1;
	*position += step;
	return 1;
}

/* Consumes up to `limit` records: 0, or -1 with an exception and nothing consumed. When there is
 * an exception after the first record, the drain ends before it, so that nothing that has been
 * consumed is lost; the next drain meets it again as its first. */
static int ring_consume(Consumer *consumer, const struct state *state, Decoder *decoder,
			Py_ssize_t limit, enum stop *stop)
{
	Ring *self = (Ring *)consumer;
	uint64_t start = consumer_position(self), position = start, end = start;
	Py_ssize_t count = 0;
	int result = 1;
	*stop = STOP_EMPTY;
	while (result == 1) {
		if (position == end) {
			if (UNLIKELY(!find_end(self, position, &end)))
				result = -1;
			if (position == end || result < 0)
				break;
		}
		if (count == limit) {
			*stop = STOP_LIMIT;
			break;
		}
		result = consume(self, state, decoder, &position, end);
		if (result == 0)
			*stop = STOP_BUSY;
		count += result == 1;
	}
	if (position != start)
		__atomic_store_n((uint64_t *)self->consumer.buf, position, __ATOMIC_RELEASE);
	if (result >= 0)
		return 0;
	if (position == start)
		return -1;
	PyErr_Clear();
	*stop = STOP_LIMIT;
	return 0;
}

static PyObject *ring_drain(Ring *self, PyObject *const *args, Py_ssize_t count)
{
	if (check_open(self) < 0)
		return NULL;
	return drain(&self->base, args, count, ring_consume);
}

static PyObject *ring_pending(Ring *self, void *Py_UNUSED(closure))
{
	if (check_open(self) < 0)
		return NULL;
	return PyLong_FromUnsignedLongLong(producer_position(self) - consumer_position(self));
}

static PyObject *ring_close(Ring *self, PyObject *Py_UNUSED(ignored))
{
	if (self->base.draining) {
		PyErr_SetString(PyExc_RuntimeError, "the ring is being drained");
		return NULL;
	}
	PyBuffer_Release(&self->consumer);
	PyBuffer_Release(&self->producer);
	self->data = NULL;
	Py_RETURN_NONE;
}

static int set_shape(Ring *self, Py_ssize_t offset)
{
	if (self->consumer.len < (Py_ssize_t)sizeof(uint64_t))
		return shape_error("consumer has less than 8 bytes");
	if (offset < (Py_ssize_t)sizeof(uint64_t) || offset % ROUND != 0)
		return shape_error("data_offset is not a positive multiple of 8");
	Py_ssize_t mapped = self->producer.len - offset;
	if (mapped < 2 * ROUND || mapped % ROUND != 0)
		return shape_error("producer does not hold data, and some of it again");
	if (((uintptr_t)self->consumer.buf | (uintptr_t)self->producer.buf) % ROUND != 0)
		return shape_error("a buffer is not aligned to 8 bytes");
	self->data = (const uint8_t *)self->producer.buf + offset;
	self->size = ROUND; /* the largest power of two that is less than what is mapped */
	while (self->size < (uint64_t)mapped - self->size)
		self->size *= 2;
	self->mapped = (uint64_t)mapped;
	return 0;
}

static PyObject *ring_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"consumer", "producer", "data_offset", NULL};
	PyObject *consumer, *producer;
	Py_ssize_t offset = 4096;
	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|n:Ring", names, &consumer, &producer,
					 &offset))
		return NULL;
	Ring *self = (Ring *)type->tp_alloc(type, 0);
	if (self == NULL)
		return NULL;
	if (PyObject_GetBuffer(consumer, &self->consumer, PyBUF_WRITABLE) < 0 ||
	    PyObject_GetBuffer(producer, &self->producer, PyBUF_SIMPLE) < 0 ||
	    set_shape(self, offset) < 0)
		Py_CLEAR(self);
	return (PyObject *)self;
}

static int ring_traverse(Ring *self, visitproc visit, void *arg)
{
	Py_VISIT(self->consumer.obj);
	Py_VISIT(self->producer.obj);
	return consumer_traverse(&self->base, visit, arg);
}

static void ring_dealloc(Ring *self)
{
	PyObject_GC_UnTrack(self);
	consumer_clear(&self->base);
	PyBuffer_Release(&self->consumer);
	PyBuffer_Release(&self->producer);
	consumer_free(&self->base);
}

static PyMethodDef ring_methods[] = {
	{"drain", (PyCFunction)(void (*)(void))ring_drain, METH_FASTCALL, PyDoc_STR(
		"drain(decoder, max_records, /)\n--\n\n"
		"Consume and decode up to max_records records; a Drained.")},
	{"next_seq", (PyCFunction)next_seq, METH_O, PyDoc_STR(
		"next_seq(cpu, /)\n--\n\nThe sequence number that the CPU's next record should have.")},
	{"expect", (PyCFunction)(void (*)(void))expect, METH_FASTCALL, PyDoc_STR(
		"expect(cpu, seq, /)\n--\n\nGo on where another reader has come to: next is seq.")},
	{"close", (PyCFunction)ring_close, METH_NOARGS, PyDoc_STR(
		"close()\n--\n\nLet go of both buffers. Harmless when called twice.")},
	{NULL, NULL, 0, NULL},
};

static PyGetSetDef ring_getset[] = {
	{"pending", (getter)ring_pending, NULL,
	 PyDoc_STR("bytes between the consumer's and the producer's position"), NULL},
	{NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef ring_members[] = {
	{"records", T_ULONGLONG, offsetof(Ring, base.records), READONLY,
	 PyDoc_STR("records consumed that were not discarded, refused ones included")},
	{"discarded", T_ULONGLONG, offsetof(Ring, base.discarded), READONLY,
	 PyDoc_STR("records consumed that the producer had discarded")},
	{NULL, 0, 0, 0, NULL},
};

static PyType_Slot ring_slots[] = {
	{Py_tp_doc, (void *)PyDoc_STR(
		"Ring(consumer, producer, data_offset=4096)\n--\n\n"
		"The consumer of one BPF ring buffer.")},
	{Py_tp_new, ring_new},
	{Py_tp_dealloc, ring_dealloc},
	{Py_tp_traverse, ring_traverse},
	{Py_tp_clear, consumer_clear},
	{Py_tp_methods, ring_methods},
	{Py_tp_getset, ring_getset},
	{Py_tp_members, ring_members},
	{0, NULL},
};

static PyType_Spec ring_spec = {
	.name = "streamer.ring._records.Ring",
	.basicsize = sizeof(Ring),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
	.slots = ring_slots,
};

/* ------------------------------------------------------------ PerfBuffers */

/* struct perf_event_mmap_page and the records, of linux/perf_event.h. */
enum {
	PERF_HEAD = 1024,
	PERF_TAIL = 1032,
	PERF_HEADER = 8,
	PERF_SAMPLE = 9,
	PERF_SAMPLE_DATA = 12, /* behind the header and the u32 of the data's length */
	PERF_LOST = 2,
	PERF_LOST_COUNT = 16,
	PERF_LOST_SIZE = 24,
	PERF_LARGEST = 1 << 16,
};

struct perf_buffer {
	Py_buffer memory;
	uint8_t *data;
	uint64_t size;
	uint64_t before; /* bytes that earlier buffers of its CPU have carried */
	uint64_t added;  /* how many came before it */
	uint16_t cpu;
	bool replaced;   /* its CPU writes to another one by now */
	/* In a drain: how far it has come, where the kernel was, and the next sample. */
	uint64_t position, end, boot_ns;
	uint32_t step, length;
};

typedef struct {
	Consumer base;
	struct perf_buffer **buffers;
	struct perf_buffer **heap; /* in a drain: those with a sample, the oldest first */
	uint32_t count;
	uint64_t added;
	uint64_t lost;
	uint8_t *scratch; /* a record that goes round the end of a buffer */
	bool closed;
} PerfBuffers;

static inline uint64_t perf_head(const struct perf_buffer *buffer)
{
	const uint8_t *page = buffer->memory.buf;
	return __atomic_load_n((const uint64_t *)(page + PERF_HEAD), __ATOMIC_ACQUIRE);
}

static inline uint64_t perf_tail(const struct perf_buffer *buffer)
{
	const uint8_t *page = buffer->memory.buf;
	return __atomic_load_n((const uint64_t *)(page + PERF_TAIL), __ATOMIC_RELAXED);
}

static inline void set_perf_tail(const struct perf_buffer *buffer, uint64_t position)
{
	uint8_t *page = buffer->memory.buf;
	__atomic_store_n((uint64_t *)(page + PERF_TAIL), position, __ATOMIC_RELEASE);
}

static void copy_from(const struct perf_buffer *buffer, uint64_t position, void *to, size_t size)
{
	uint64_t offset = position & (buffer->size - 1);
	size_t first = Py_MIN(size, buffer->size - offset);
	memcpy(to, buffer->data + offset, first);
	memcpy((uint8_t *)to + first, buffer->data, size - first);
}

/* Eight bytes at a multiple of eight, which are never split. */
static inline uint64_t word_at(const struct perf_buffer *buffer, uint64_t position)
{
	return load64(buffer->data + (position & (buffer->size - 1)));
}

static int perf_corrupt(const struct perf_buffer *buffer, uint64_t size)
{
	PyErr_Format(PyExc_ValueError,
		     "corrupt perf buffer: CPU %u, a record of %llu bytes at %llu, "
		     "where %llu are pending",
		     (unsigned)buffer->cpu, (unsigned long long)size,
		     (unsigned long long)buffer->position,
		     (unsigned long long)(buffer->end - buffer->position));
	return -1;
}

static void see_sample(const Decoder *decoder, struct perf_buffer *buffer)
{
	uint64_t boot_ns = 0;
	buffer->length = 0;
	if (buffer->step >= PERF_HEADER + ROUND) {
		uint32_t said = (uint32_t)word_at(buffer, buffer->position + PERF_HEADER);
		buffer->length = Py_MIN(said, buffer->step - PERF_SAMPLE_DATA);
	}
	if (LIKELY(buffer->length >= decoder->header.total))
		copy_from(buffer, buffer->position + PERF_SAMPLE_DATA + decoder->header.boot_ns,
			  &boot_ns, sizeof(boot_ns));
	buffer->boot_ns = boot_ns;
}

/* Goes on to the next sample: 1; 0 if there is none, -1 with an exception. */
static int find_sample(PerfBuffers *self, const Decoder *decoder, struct perf_buffer *buffer)
{
	while (buffer->position != buffer->end) {
		uint64_t header = word_at(buffer, buffer->position);
		uint32_t type = (uint32_t)header, size = (uint32_t)(header >> 48);
		if (UNLIKELY(size < PERF_HEADER || size % ROUND != 0 ||
			     size > buffer->end - buffer->position))
			return perf_corrupt(buffer, size);
		buffer->step = size;
		if (LIKELY(type == PERF_SAMPLE)) {
			see_sample(decoder, buffer);
			return 1;
		}
		if (type == PERF_LOST && size >= PERF_LOST_SIZE)
			self->lost += word_at(buffer, buffer->position + PERF_LOST_COUNT);
		else
			self->base.discarded++;
		buffer->position += size;
	}
	return 0;
}

static inline bool is_older(const struct perf_buffer *one, const struct perf_buffer *other)
{
	if (one->boot_ns != other->boot_ns)
		return one->boot_ns < other->boot_ns;
	return one->cpu != other->cpu ? one->cpu < other->cpu : one->added < other->added;
}

static void sift_down(struct perf_buffer **heap, uint32_t count, uint32_t at)
{
	struct perf_buffer *moved = heap[at];
	for (;;) {
		uint32_t child = 2 * at + 1;
		if (child >= count)
			break;
		if (child + 1 < count && is_older(heap[child + 1], heap[child]))
			child++;
		if (!is_older(heap[child], moved))
			break;
		heap[at] = heap[child];
		at = child;
	}
	heap[at] = moved;
}

/* Looks at every buffer. How many have a sample, or -1 with an exception. */
static int64_t fill_heap(PerfBuffers *self, const Decoder *decoder)
{
	uint32_t count = 0;
	for (uint32_t i = 0; i < self->count; i++) {
		struct perf_buffer *buffer = self->buffers[i];
		buffer->position = buffer->end = perf_tail(buffer);
	}
	for (uint32_t i = 0; i < self->count; i++) {
		struct perf_buffer *buffer = self->buffers[i];
		uint64_t head = perf_head(buffer);
		if (UNLIKELY(head - buffer->position > buffer->size || buffer->position % ROUND)) {
			PyErr_Format(PyExc_ValueError,
				     "corrupt perf buffer: CPU %u, read to %llu, written to %llu, "
				     "size %llu",
				     (unsigned)buffer->cpu, (unsigned long long)buffer->position,
				     (unsigned long long)head, (unsigned long long)buffer->size);
			return -1;
		}
		buffer->end = head;
		int found = find_sample(self, decoder, buffer);
		if (found < 0)
			return -1;
		if (found)
			self->heap[count++] = buffer;
	}
	for (uint32_t i = count / 2; i-- > 0;)
		sift_down(self->heap, count, i);
	return count;
}

static int take_sample(PerfBuffers *self, const struct state *state, Decoder *decoder,
		       const struct perf_buffer *buffer)
{
	uint64_t position = buffer->position + PERF_SAMPLE_DATA;
	uint64_t offset = position & (buffer->size - 1);
	const uint8_t *record = buffer->data + offset;
	if (UNLIKELY(offset + buffer->length > buffer->size)) {
		copy_from(buffer, position, self->scratch, buffer->length);
		record = self->scratch;
	}
	return take(&self->base, state, decoder, record, buffer->length);
}

/* Lets go of a buffer that is empty, and that nothing writes to any more. */
static void drop_buffer(PerfBuffers *self, uint32_t index)
{
	struct perf_buffer *gone = self->buffers[index];
	for (uint32_t i = index + 1; i < self->count; i++) {
		if (self->buffers[i]->cpu == gone->cpu) {
			self->buffers[i]->before += gone->before + perf_tail(gone);
			break;
		}
	}
	PyBuffer_Release(&gone->memory);
	PyMem_Free(gone);
	self->count--;
	memmove(&self->buffers[index], &self->buffers[index + 1],
		(self->count - index) * sizeof(*self->buffers));
}

static void drop_replaced(PerfBuffers *self)
{
	for (uint32_t i = self->count; i-- > 0;) {
		const struct perf_buffer *buffer = self->buffers[i];
		if (UNLIKELY(buffer->replaced) && perf_head(buffer) == perf_tail(buffer))
			drop_buffer(self, i);
	}
}

/* The oldest sample of all comes first; those of one CPU stay in their order. As in a Ring, an
 * exception after the first sample ends the drain, and the next one meets it again. */
static int perf_consume(Consumer *consumer, const struct state *state, Decoder *decoder,
			Py_ssize_t limit, enum stop *stop)
{
	PerfBuffers *self = (PerfBuffers *)consumer;
	Py_ssize_t taken = 0;
	int result = 0;
	int64_t left = fill_heap(self, decoder);
	*stop = STOP_EMPTY;
	while (left > 0) {
		struct perf_buffer *oldest = self->heap[0];
		if (taken == limit) {
			*stop = STOP_LIMIT;
			break;
		}
		result = take_sample(self, state, decoder, oldest);
		if (UNLIKELY(result < 0))
			break;
		taken++;
		oldest->position += oldest->step;
		result = find_sample(self, decoder, oldest);
		if (UNLIKELY(result < 0))
			break;
		if (result == 0)
			self->heap[0] = self->heap[--left];
		sift_down(self->heap, (uint32_t)left, 0);
	}
	for (uint32_t i = 0; i < self->count; i++) {
		if (self->buffers[i]->position != perf_tail(self->buffers[i]))
			set_perf_tail(self->buffers[i], self->buffers[i]->position);
	}
	drop_replaced(self);
	if (left >= 0 && result >= 0)
		return 0;
	if (taken == 0)
		return -1;
	PyErr_Clear();
	*stop = STOP_LIMIT;
	return 0;
}

static int perf_check(const PerfBuffers *self)
{
	if (self->base.draining) {
		PyErr_SetString(PyExc_RuntimeError, "the buffers are being drained");
		return -1;
	}
	if (!self->closed)
		return 0;
	PyErr_SetString(PyExc_ValueError, "the buffers are closed");
	return -1;
}

static PyObject *perf_drain(PerfBuffers *self, PyObject *const *args, Py_ssize_t count)
{
	if (perf_check(self) < 0)
		return NULL;
	return drain(&self->base, args, count, perf_consume);
}

static int set_perf_shape(struct perf_buffer *buffer, Py_ssize_t offset)
{
	if (offset < PERF_TAIL + ROUND || offset % ROUND != 0)
		return shape_error("data_offset is not a multiple of 8 behind the positions");
	Py_ssize_t size = buffer->memory.len - offset;
	if (size < ROUND || (size & (size - 1)) != 0)
		return shape_error("memory does not hold a power of two of data");
	if ((uintptr_t)buffer->memory.buf % ROUND != 0)
		return shape_error("memory is not aligned to 8 bytes");
	buffer->data = (uint8_t *)buffer->memory.buf + offset;
	buffer->size = (uint64_t)size;
	return 0;
}

static int perf_grow(PerfBuffers *self)
{
	size_t bytes = (self->count + 1) * sizeof(*self->buffers);
	struct perf_buffer **buffers = PyMem_Realloc(self->buffers, bytes);
	if (buffers != NULL)
		self->buffers = buffers;
	struct perf_buffer **heap = PyMem_Realloc(self->heap, bytes);
	if (heap != NULL)
		self->heap = heap;
	if (self->scratch == NULL)
		self->scratch = PyMem_Malloc(PERF_LARGEST);
	if (buffers != NULL && heap != NULL && self->scratch != NULL)
		return 0;
	PyErr_NoMemory();
	return -1;
}

static PyObject *perf_add(PerfBuffers *self, PyObject *args)
{
	PyObject *memory, *number;
	Py_ssize_t offset = 4096;
	if (!PyArg_ParseTuple(args, "OO|n:add", &number, &memory, &offset))
		return NULL;
	long cpu = cpu_from(number);
	if (cpu < 0 || perf_check(self) < 0 || perf_grow(self) < 0)
		return NULL;
	struct perf_buffer *buffer = PyMem_Calloc(1, sizeof(*buffer));
	if (buffer == NULL)
		return PyErr_NoMemory();
	if (PyObject_GetBuffer(memory, &buffer->memory, PyBUF_WRITABLE) < 0 ||
	    set_perf_shape(buffer, offset) < 0) {
		PyBuffer_Release(&buffer->memory);
		PyMem_Free(buffer);
		return NULL;
	}
	buffer->cpu = (uint16_t)cpu;
	buffer->added = self->added++;
	for (uint32_t i = 0; i < self->count; i++)
		self->buffers[i]->replaced |= self->buffers[i]->cpu == cpu;
	self->buffers[self->count++] = buffer;
	drop_replaced(self);
	Py_RETURN_NONE;
}

/* The sum of one position over the buffers of a CPU. */
static PyObject *perf_position(PerfBuffers *self, PyObject *number,
			       uint64_t (*position)(const struct perf_buffer *))
{
	long cpu = cpu_from(number);
	uint64_t sum = 0;
	if (cpu < 0 || perf_check(self) < 0)
		return NULL;
	for (uint32_t i = 0; i < self->count; i++) {
		if (self->buffers[i]->cpu == cpu)
			sum += self->buffers[i]->before + position(self->buffers[i]);
	}
	return PyLong_FromUnsignedLongLong(sum);
}

static PyObject *perf_produced(PerfBuffers *self, PyObject *number)
{
	return perf_position(self, number, perf_head);
}

static PyObject *perf_consumed(PerfBuffers *self, PyObject *number)
{
	return perf_position(self, number, perf_tail);
}

static PyObject *perf_pending(PerfBuffers *self, void *Py_UNUSED(closure))
{
	uint64_t sum = 0;
	if (perf_check(self) < 0)
		return NULL;
	for (uint32_t i = 0; i < self->count; i++)
		sum += perf_head(self->buffers[i]) - perf_tail(self->buffers[i]);
	return PyLong_FromUnsignedLongLong(sum);
}

static void perf_release(PerfBuffers *self)
{
	for (uint32_t i = 0; i < self->count; i++) {
		PyBuffer_Release(&self->buffers[i]->memory);
		PyMem_Free(self->buffers[i]);
	}
	self->count = 0;
	PyMem_Free(self->buffers);
	PyMem_Free(self->heap);
	PyMem_Free(self->scratch);
	self->buffers = self->heap = NULL;
	self->scratch = NULL;
	self->closed = true;
}

static PyObject *perf_close(PerfBuffers *self, PyObject *Py_UNUSED(ignored))
{
	if (self->base.draining) {
		PyErr_SetString(PyExc_RuntimeError, "the buffers are being drained");
		return NULL;
	}
	perf_release(self);
	Py_RETURN_NONE;
}

static PyObject *perf_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {NULL};
	if (!PyArg_ParseTupleAndKeywords(args, kwargs, ":PerfBuffers", names))
		return NULL;
	return type->tp_alloc(type, 0);
}

static int perf_traverse(PerfBuffers *self, visitproc visit, void *arg)
{
	for (uint32_t i = 0; i < self->count; i++)
		Py_VISIT(self->buffers[i]->memory.obj);
	return consumer_traverse(&self->base, visit, arg);
}

static void perf_dealloc(PerfBuffers *self)
{
	PyObject_GC_UnTrack(self);
	consumer_clear(&self->base);
	perf_release(self);
	consumer_free(&self->base);
}

static PyMethodDef perf_methods[] = {
	{"add", (PyCFunction)perf_add, METH_VARARGS, PyDoc_STR(
		"add(cpu, memory, data_offset=4096, /)\n--\n\n"
		"Read the buffer of a CPU as well; if it has one already, that one to its end first.")},
	{"drain", (PyCFunction)(void (*)(void))perf_drain, METH_FASTCALL, PyDoc_STR(
		"drain(decoder, max_records, /)\n--\n\n"
		"Consume and decode up to max_records records, the oldest first; a Drained.")},
	{"next_seq", (PyCFunction)next_seq, METH_O, PyDoc_STR(
		"next_seq(cpu, /)\n--\n\nThe sequence number that the CPU's next record should have.")},
	{"produced", (PyCFunction)perf_produced, METH_O, PyDoc_STR(
		"produced(cpu, /)\n--\n\nBytes that were ever written for a CPU.")},
	{"consumed", (PyCFunction)perf_consumed, METH_O, PyDoc_STR(
		"consumed(cpu, /)\n--\n\nBytes that were ever read of a CPU.")},
	{"close", (PyCFunction)perf_close, METH_NOARGS, PyDoc_STR(
		"close()\n--\n\nLet go of all buffers. Harmless when called twice.")},
	{NULL, NULL, 0, NULL},
};

static PyGetSetDef perf_getset[] = {
	{"pending", (getter)perf_pending, NULL,
	 PyDoc_STR("bytes that were written and not read, in all buffers"), NULL},
	{NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef perf_members[] = {
	{"records", T_ULONGLONG, offsetof(PerfBuffers, base.records), READONLY,
	 PyDoc_STR("records consumed, refused ones included")},
	{"discarded", T_ULONGLONG, offsetof(PerfBuffers, base.discarded), READONLY,
	 PyDoc_STR("the kernel's own records, other than those of losses")},
	{"lost", T_ULONGLONG, offsetof(PerfBuffers, lost), READONLY,
	 PyDoc_STR("records that found no room, as the kernel's own records say")},
	{NULL, 0, 0, 0, NULL},
};

static PyType_Slot perf_slots[] = {
	{Py_tp_doc, (void *)PyDoc_STR(
		"PerfBuffers()\n--\n\n"
		"The consumer of the perf buffers of all CPUs.")},
	{Py_tp_new, perf_new},
	{Py_tp_dealloc, perf_dealloc},
	{Py_tp_traverse, perf_traverse},
	{Py_tp_clear, consumer_clear},
	{Py_tp_methods, perf_methods},
	{Py_tp_getset, perf_getset},
	{Py_tp_members, perf_members},
	{0, NULL},
};

static PyType_Spec perf_spec = {
	.name = "streamer.ring._records.PerfBuffers",
	.basicsize = sizeof(PerfBuffers),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
	.slots = perf_slots,
};

/* ----------------------------------------------------------------- module */

static PyStructSequence_Field drained_fields[] = {
	{"events", "Structs, in the order of the ring"},
	{"kinds", "number of events per dotted kind"},
	{"gaps", "anomalies of the sequence: (what, cpu, first, last)"},
	{"more", "whether it stopped at max_records"},
	{"busy", "whether it stopped at a record that is still being written"},
	{NULL, NULL},
};

static PyStructSequence_Desc drained_desc = {
	.name = "streamer.ring._records.Drained",
	.doc = "What one drain gave.",
	.fields = drained_fields,
	.n_in_sequence = 5,
};

static int add_types(PyObject *module, struct state *state)
{
	state->decoder = (PyTypeObject *)PyType_FromModuleAndSpec(module, &decoder_spec, NULL);
	if (state->decoder == NULL || PyModule_AddType(module, state->decoder) < 0)
		return -1;
	state->ring = (PyTypeObject *)PyType_FromModuleAndSpec(module, &ring_spec, NULL);
	if (state->ring == NULL || PyModule_AddType(module, state->ring) < 0)
		return -1;
	state->perf_buffers = (PyTypeObject *)PyType_FromModuleAndSpec(module, &perf_spec, NULL);
	if (state->perf_buffers == NULL || PyModule_AddType(module, state->perf_buffers) < 0)
		return -1;
	state->drained = PyStructSequence_NewType(&drained_desc);
	if (state->drained == NULL || PyModule_AddType(module, state->drained) < 0)
		return -1;
	return 0;
}

static int module_exec(PyObject *module)
{
	struct state *state = PyModule_GetState(module);
	state->missing = PyUnicode_InternFromString("missing");
	state->late = PyUnicode_InternFromString("late");
	state->skipped = PyUnicode_InternFromString("skipped");
	if (state->missing == NULL || state->late == NULL || state->skipped == NULL)
		return -1;
	return add_types(module, state);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
	struct state *state = PyModule_GetState(module);
	Py_VISIT(state->decoder);
	Py_VISIT(state->ring);
	Py_VISIT(state->perf_buffers);
	Py_VISIT(state->drained);
	return 0;
}

static int module_clear(PyObject *module)
{
	struct state *state = PyModule_GetState(module);
	Py_CLEAR(state->decoder);
	Py_CLEAR(state->ring);
	Py_CLEAR(state->perf_buffers);
	Py_CLEAR(state->drained);
	Py_CLEAR(state->missing);
	Py_CLEAR(state->late);
	Py_CLEAR(state->skipped);
	return 0;
}

static void module_free(void *module)
{
	module_clear(module);
}

static PyModuleDef_Slot module_slots[] = {
	{Py_mod_exec, module_exec},
	{0, NULL},
};

static struct PyModuleDef module_def = {
	PyModuleDef_HEAD_INIT,
	.m_name = "streamer.ring._records",
	.m_doc = PyDoc_STR("Reads a BPF ring buffer and decodes its records to msgspec Structs."),
	.m_size = sizeof(struct state),
	.m_slots = module_slots,
	.m_traverse = module_traverse,
	.m_clear = module_clear,
	.m_free = module_free,
};

PyMODINIT_FUNC PyInit__records(void);

PyMODINIT_FUNC PyInit__records(void)
{
	return PyModuleDef_Init(&module_def);
}
