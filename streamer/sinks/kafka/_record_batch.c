/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The records of a Kafka record batch, laid out in one go and read back, and its checksum.
 *
 * `_record_batch.pyi` documents what Python sees; `record_batch.py` is the same in plain Python
 * and the oracle of this file in the tests. The format is that of Kafka's documentation ("Message
 * Format"): each record is its length, attributes, timestamp and offset less those of the first
 * record, key, value and number of headers, with lengths and differences as zigzag varints.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum {
	VARINT_MOST = 10,
	/* Length, attributes, two differences, length of the value, number of headers. */
	OVERHEAD_MOST = 4 * VARINT_MOST + 2,
};
static const int64_t NS_PER_MS = 1000000;

struct key {
	uint8_t *bytes; /* with its length before it */
	size_t size;
};

struct batch {
	struct key key;
	uint8_t *at; /* where the next record goes */
	Py_ssize_t count;
	int64_t first_ms, last_ms; /* last: the latest */
};

/* Times in nanoseconds: an array('q'), held while they are read. */
struct times {
	Py_buffer view;
	const int64_t *ns;
	Py_ssize_t count;
};

static inline uint64_t zigzag(int64_t value)
{
	return (uint64_t)value << 1 ^ (uint64_t)(value >> 63);
}

static inline size_t varint_size(int64_t value)
{
	uint64_t rest = zigzag(value) | 1;
	return (size_t)(63 - __builtin_clzll(rest)) / 7 + 1;
}

static inline uint8_t *put_varint(uint8_t *at, int64_t value)
{
	uint64_t rest = zigzag(value);
	for (; rest >= 0x80; rest >>= 7)
		*at++ = (uint8_t)(rest | 0x80);
	*at++ = (uint8_t)rest;
	return at;
}

static inline int64_t floor_ms(int64_t ns)
{
	return ns / NS_PER_MS - (ns % NS_PER_MS < 0);
}

static void put_record(struct batch *batch, const char *value, size_t size, int64_t time_ms)
{
	if (batch->count == 0)
		batch->first_ms = batch->last_ms = time_ms;
	if (time_ms > batch->last_ms)
		batch->last_ms = time_ms;
	int64_t since = time_ms - batch->first_ms;
	size_t length = 1 + varint_size(since) + varint_size(batch->count) + batch->key.size +
			varint_size((int64_t)size) + size + 1;
	uint8_t *at = put_varint(batch->at, (int64_t)length);
	*at++ = 0; /* attributes */
	at = put_varint(at, since);
	at = put_varint(at, batch->count);
	memcpy(at, batch->key.bytes, batch->key.size);
	at = put_varint(at + batch->key.size, (int64_t)size);
	memcpy(at, value, size);
	at += size;
	*at++ = 0; /* headers */
	batch->at = at;
	batch->count++;
}

static int mismatch(void)
{
	PyErr_SetString(PyExc_ValueError, "a piece has not as many records as times");
	return -1;
}

static int put_lines(struct batch *batch, PyObject *lines, const struct times *times)
{
	const char *at = PyBytes_AS_STRING(lines), *end = at + PyBytes_GET_SIZE(lines);
	for (Py_ssize_t i = 0; i < times->count; i++) {
		const char *newline = memchr(at, '\n', (size_t)(end - at));
		if (newline == NULL)
			return mismatch();
		put_record(batch, at, (size_t)(newline - at), floor_ms(times->ns[i]));
		at = newline + 1;
	}
	return at == end ? 0 : mismatch();
}

static int put_list(struct batch *batch, PyObject *records, const struct times *times)
{
	if (PyList_GET_SIZE(records) != times->count)
		return mismatch();
	for (Py_ssize_t i = 0; i < times->count; i++) {
		PyObject *record = PyList_GET_ITEM(records, i);
		put_record(batch, PyBytes_AS_STRING(record), (size_t)PyBytes_GET_SIZE(record),
			   floor_ms(times->ns[i]));
	}
	return 0;
}

/* -1 with an exception when `object` is no array of 64-bit integers. */
static int open_times(struct times *times, PyObject *object)
{
	if (PyObject_GetBuffer(object, &times->view, PyBUF_FORMAT | PyBUF_ND) < 0)
		return -1;
	if (times->view.ndim != 1 || times->view.format == NULL ||
	    strcmp(times->view.format, "q") != 0) {
		PyBuffer_Release(&times->view);
		PyErr_SetString(PyExc_TypeError, "the times of a piece are no array('q')");
		return -1;
	}
	times->ns = times->view.buf;
	times->count = times->view.len / (Py_ssize_t)sizeof(*times->ns);
	return 0;
}

/* Bytes of the records themselves; -1 with an exception. */
static Py_ssize_t data_size(PyObject *data)
{
	if (PyBytes_Check(data))
		return PyBytes_GET_SIZE(data);
	Py_ssize_t size = 0;
	for (Py_ssize_t i = 0; PyList_Check(data) && i < PyList_GET_SIZE(data); i++) {
		PyObject *record = PyList_GET_ITEM(data, i);
		if (!PyBytes_Check(record)) {
			size = -1;
			break;
		}
		size += PyBytes_GET_SIZE(record);
	}
	if (size < 0 || !PyList_Check(data)) {
		PyErr_SetString(PyExc_TypeError, "the records of a piece are neither bytes of lines "
						 "nor a list of bytes");
		return -1;
	}
	return size;
}

/* More than enough for all records; -1 with an exception. */
static Py_ssize_t room_for(PyObject *pieces, size_t key_size)
{
	Py_ssize_t room = 0;
	for (Py_ssize_t i = 0; i < PyList_GET_SIZE(pieces); i++) {
		PyObject *piece = PyList_GET_ITEM(pieces, i);
		if (!PyTuple_Check(piece) || PyTuple_GET_SIZE(piece) < 2) {
			PyErr_SetString(PyExc_TypeError,
					"a piece is not a tuple of records and their times");
			return -1;
		}
		Py_ssize_t size = data_size(PyTuple_GET_ITEM(piece, 0));
		Py_ssize_t count = size < 0 ? -1 : PyObject_Size(PyTuple_GET_ITEM(piece, 1));
		if (count < 0)
			return -1;
		room += size + count * (Py_ssize_t)(OVERHEAD_MOST + key_size);
	}
	if (room > INT32_MAX) {
		PyErr_SetString(PyExc_ValueError, "a record batch of more than 2 GiB");
		return -1;
	}
	return room;
}

static int put_pieces(struct batch *batch, PyObject *pieces)
{
	for (Py_ssize_t i = 0; i < PyList_GET_SIZE(pieces); i++) {
		PyObject *piece = PyList_GET_ITEM(pieces, i);
		PyObject *data = PyTuple_GET_ITEM(piece, 0);
		struct times times;
		if (open_times(&times, PyTuple_GET_ITEM(piece, 1)) < 0)
			return -1;
		int result = PyBytes_Check(data) ? put_lines(batch, data, &times) :
						   put_list(batch, data, &times);
		PyBuffer_Release(&times.view);
		if (result < 0)
			return -1;
	}
	return 0;
}

static PyObject *lay_out(struct batch *batch, PyObject *pieces)
{
	Py_ssize_t room = room_for(pieces, batch->key.size);
	PyObject *body = room < 0 ? NULL : PyBytes_FromStringAndSize(NULL, room);
	if (body == NULL)
		return NULL;
	uint8_t *start = (uint8_t *)PyBytes_AS_STRING(body);
	batch->at = start;
	if (put_pieces(batch, pieces) < 0) {
		Py_DECREF(body);
		return NULL;
	}
	if (_PyBytes_Resize(&body, batch->at - start) < 0)
		return NULL;
	return Py_BuildValue("(NnLL)", body, batch->count, (long long)batch->first_ms,
			     (long long)batch->last_ms);
}

static int set_key(struct key *key, PyObject *bytes)
{
	size_t size = (size_t)PyBytes_GET_SIZE(bytes);
	key->bytes = PyMem_Malloc(VARINT_MOST + size);
	if (key->bytes == NULL) {
		PyErr_NoMemory();
		return -1;
	}
	uint8_t *at = put_varint(key->bytes, (int64_t)size);
	memcpy(at, PyBytes_AS_STRING(bytes), size);
	key->size = (size_t)(at - key->bytes) + size;
	return 0;
}

static PyObject *records(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
	if (count != 2 || !PyList_Check(args[0]) || !PyBytes_Check(args[1])) {
		PyErr_SetString(PyExc_TypeError, "records() takes a list of pieces and a key");
		return NULL;
	}
	struct batch batch = {0};
	if (set_key(&batch.key, args[1]) < 0)
		return NULL;
	PyObject *result = lay_out(&batch, args[0]);
	PyMem_Free(batch.key.bytes);
	return result;
}

/* What is left of records that are read. */
struct rest {
	const uint8_t *at, *end;
};

/* False: there is none, or it is longer than any. */
static bool take_varint(struct rest *rest, int64_t *value)
{
	uint64_t zigzagged = 0;
	for (unsigned shift = 0; shift < 7 * VARINT_MOST && rest->at < rest->end; shift += 7) {
		uint8_t byte = *rest->at++;
		zigzagged |= (uint64_t)(byte & 0x7f) << shift;
		if (byte < 0x80) {
			*value = (int64_t)(zigzagged >> 1 ^ -(zigzagged & 1));
			return true;
		}
	}
	return false;
}

/* A field of so many bytes as its length says, which may be -1 for none. */
static bool take_field(struct rest *rest, struct rest *field, bool *is_null)
{
	int64_t size;
	if (!take_varint(rest, &size) || size > rest->end - rest->at)
		return false;
	*is_null = size < 0;
	field->at = rest->at;
	field->end = rest->at = rest->at + (size < 0 ? 0 : size);
	return true;
}

struct record {
	int64_t offset; /* less that of the batch */
	struct rest value;
	bool is_null;
};

/* The next record; what is behind its value is passed over. */
static bool take_record(struct rest *rest, struct record *record)
{
	struct rest inside, key;
	bool no_key, no_record;
	int64_t time;
	if (!take_field(rest, &inside, &no_record) || inside.at == inside.end)
		return false;
	inside.at++; /* attributes */
	return take_varint(&inside, &time) && take_varint(&inside, &record->offset) &&
	       take_field(&inside, &key, &no_key) &&
	       take_field(&inside, &record->value, &record->is_null);
}

static PyObject *corrupt(PyObject *list)
{
	Py_DECREF(list);
	PyErr_SetString(PyExc_ValueError, "the records of a batch are corrupt");
	return NULL;
}

/* The values of so many records, from an offset on. */
static PyObject *take_values(struct rest rest, long long count, long long from)
{
	PyObject *list = PyList_New(0);
	if (list == NULL)
		return NULL;
	for (long long i = 0; i < count; i++) {
		struct record record;
		if (!take_record(&rest, &record))
			return corrupt(list);
		if (record.is_null || record.offset < from)
			continue;
		PyObject *value = PyBytes_FromStringAndSize((const char *)record.value.at,
							    record.value.end - record.value.at);
		int failed = value == NULL || PyList_Append(list, value) < 0;
		Py_XDECREF(value);
		if (failed) {
			Py_DECREF(list);
			return NULL;
		}
	}
	return rest.at == rest.end ? list : corrupt(list);
}

static PyObject *values(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
	if (count != 3 || !PyBytes_Check(args[0])) {
		PyErr_SetString(PyExc_TypeError, "values() takes bytes, a number and an offset");
		return NULL;
	}
	long long number = PyLong_AsLongLong(args[1]), from = PyLong_AsLongLong(args[2]);
	if ((number == -1 || from == -1) && PyErr_Occurred())
		return NULL;
	const uint8_t *at = (const uint8_t *)PyBytes_AS_STRING(args[0]);
	struct rest rest = {at, at + PyBytes_GET_SIZE(args[0])};
	return take_values(rest, number, from);
}

/*
 * CRC-32C (Castagnoli, reflected), as RFC 3720 has it in appendix B.4: by the processor's own
 * instruction, or with eight tables, a byte of eight each.
 */
static const uint32_t POLYNOMIAL = 0x82f63b78;
static uint32_t tables[8][256];

static void fill_tables(void)
{
	for (uint32_t byte = 0; byte < 256; byte++) {
		uint32_t crc = byte;
		for (int bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (crc & 1 ? POLYNOMIAL : 0);
		tables[0][byte] = crc;
	}
	for (int table = 1; table < 8; table++)
		for (uint32_t byte = 0; byte < 256; byte++) {
			uint32_t before = tables[table - 1][byte];
			tables[table][byte] = before >> 8 ^ tables[0][before & 0xff];
		}
}

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "eight bytes are read at once");

static uint32_t crc32c_by_tables(uint32_t crc, const uint8_t *at, size_t size)
{
	for (; size >= 8; at += 8, size -= 8) {
		uint64_t eight;
		memcpy(&eight, at, 8);
		eight ^= crc;
		crc = 0;
		for (int i = 0; i < 8; i++)
			crc ^= tables[7 - i][eight >> 8 * i & 0xff];
	}
	for (; size > 0; at++, size--)
		crc = crc >> 8 ^ tables[0][(crc ^ *at) & 0xff];
	return crc;
}

static uint32_t (*crc32c_of)(uint32_t, const uint8_t *, size_t) = crc32c_by_tables;

#ifdef __x86_64__
__attribute__((target("sse4.2"))) static uint32_t crc32c_by_sse(uint32_t crc, const uint8_t *at,
								size_t size)
{
	uint64_t wide = crc;
	for (; size >= 8; at += 8, size -= 8) {
		uint64_t eight;
		memcpy(&eight, at, 8);
		wide = __builtin_ia32_crc32di(wide, eight);
	}
	crc = (uint32_t)wide;
	for (; size > 0; at++, size--)
		crc = __builtin_ia32_crc32qi(crc, *at);
	return crc;
}
#endif

static PyObject *checksum(PyObject *const *args, Py_ssize_t count,
			  uint32_t (*of)(uint32_t, const uint8_t *, size_t))
{
	uint32_t crc = ~(uint32_t)0;
	for (Py_ssize_t i = 0; i < count; i++) {
		if (!PyBytes_Check(args[i])) {
			PyErr_SetString(PyExc_TypeError, "a checksum is that of bytes");
			return NULL;
		}
		crc = of(crc, (const uint8_t *)PyBytes_AS_STRING(args[i]),
			 (size_t)PyBytes_GET_SIZE(args[i]));
	}
	return PyLong_FromUnsignedLong(~crc & 0xffffffff);
}

static PyObject *crc32c(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
	return checksum(args, count, crc32c_of);
}

static PyObject *crc32c_tables(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
	return checksum(args, count, crc32c_by_tables);
}

/* Called once, at the import: what it chooses is the same for all interpreters. */
static int choose_crc32c(PyObject *Py_UNUSED(module))
{
	fill_tables();
#ifdef __x86_64__
	if (__builtin_cpu_supports("sse4.2"))
		crc32c_of = crc32c_by_sse;
#endif
	return 0;
}

static PyMethodDef methods[] = {
	{"records", (PyCFunction)(void (*)(void))records, METH_FASTCALL, PyDoc_STR(
		"records(pieces, key, /)\n--\n\n"
		"The records of all pieces as one: bytes, count, first and latest time.")},
	{"values", (PyCFunction)(void (*)(void))values, METH_FASTCALL, PyDoc_STR(
		"values(records, count, first, /)\n--\n\n"
		"The values of so many records, from an offset in the batch on.")},
	{"crc32c", (PyCFunction)(void (*)(void))crc32c, METH_FASTCALL, PyDoc_STR(
		"crc32c(*parts)\n--\n\nCRC-32C of all parts, one behind the other.")},
	{"crc32c_tables", (PyCFunction)(void (*)(void))crc32c_tables, METH_FASTCALL, PyDoc_STR(
		"crc32c_tables(*parts)\n--\n\nThe same on any processor.")},
	{NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {
	{Py_mod_exec, choose_crc32c},
	{0, NULL},
};

static struct PyModuleDef module_def = {
	PyModuleDef_HEAD_INIT,
	.m_name = "streamer.sinks.kafka._record_batch",
	.m_doc = PyDoc_STR("The records of a Kafka record batch, laid out and read; its checksum."),
	.m_methods = methods,
	.m_slots = slots,
};

PyMODINIT_FUNC PyInit__record_batch(void);

PyMODINIT_FUNC PyInit__record_batch(void)
{
	return PyModuleDef_Init(&module_def);
}
