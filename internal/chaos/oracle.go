package chaos

import (
	"context"
	"fmt"
	"strings"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
)

// oracle is an independent slot of test_decoding. It is read once the load has
// ended, so that no fault meets it.
type oracle struct{ slot string }

// oracleChunk bounds what the server gathers for one answer, in changes.
const oracleChunk = 20_000

func (o oracle) create(ctx context.Context, conn *pgx.Conn) error {
	_, err := conn.Exec(ctx, `select pg_create_logical_replication_slot($1, 'test_decoding')`, o.slot)
	return err
}

// events returns what was committed since the slot was made.
func (o oracle) events(ctx context.Context, conn *pgx.Conn) ([]event, error) {
	var decoded transactions
	for {
		changes, err := o.read(ctx, conn, &decoded)
		if err != nil {
			return nil, fmt.Errorf("read the oracle's slot: %w", err)
		}
		if changes == 0 {
			return decoded.events, nil
		}
	}
}

// read decodes some whole transactions and returns how many lines they had.
func (o oracle) read(ctx context.Context, conn *pgx.Conn, into *transactions) (lines int, err error) {
	rows, err := conn.Query(ctx, `select lsn::text, case when data like 'table public.events: INSERT:%' or data like 'COMMIT%' then data else '' end
		from pg_logical_slot_get_changes($1, null, $2, 'include-xids', '0', 'skip-empty-xacts', '1')`, o.slot, oracleChunk)
	if err != nil {
		return 0, err
	}
	var lsn, data string
	_, err = pgx.ForEachRow(rows, []any{&lsn, &data}, func() error {
		lines++
		return into.line(lsn, data)
	})
	return lines, err
}

// transactions gathers events from the lines of test_decoding.
type transactions struct {
	events []event
	open   int // how many of the last events have no commit yet
}

// line takes one line. That of a COMMIT has the end of the commit record as its
// LSN (contrib/test_decoding; reorderbuffer's commit callback writes at end_lsn).
func (t *transactions) line(lsn, data string) error {
	switch {
	case strings.HasPrefix(data, "COMMIT"):
		end, err := pglogrepl.ParseLSN(lsn)
		if err != nil {
			return err
		}
		for i := len(t.events) - t.open; i < len(t.events); i++ {
			t.events[i].end = end
		}
		t.open = 0
	case strings.HasPrefix(data, "table public.events: INSERT:"):
		columns, err := columnsOf(strings.TrimPrefix(data, "table public.events: INSERT:"))
		if err != nil {
			return fmt.Errorf("%w in %q", err, data)
		}
		t.events = append(t.events, event{id: columns["id"], body: digestOf([]byte(columns["payload"]))})
		t.open++
	}
	return nil
}

// columnsOf parses " name[type]:value name[type]:value …" as test_decoding
// writes a tuple: a value is a number, a word or a literal in single quotes,
// which are doubled inside (print_literal in contrib/test_decoding).
func columnsOf(tuple string) (map[string]string, error) {
	columns := map[string]string{}
	for rest := tuple; rest != ""; {
		name, after, found := strings.Cut(strings.TrimPrefix(rest, " "), "[")
		_, value, typed := strings.Cut(after, "]:")
		if !found || !typed {
			return nil, fmt.Errorf("no column at %q", rest)
		}
		var err error
		if columns[name], rest, err = cutValue(value); err != nil {
			return nil, err
		}
	}
	return columns, nil
}

func cutValue(s string) (value, rest string, err error) {
	if !strings.HasPrefix(s, "'") {
		value, _, _ = strings.Cut(s, " ")
		return value, s[len(value):], nil
	}
	var b strings.Builder
	for s = s[1:]; ; {
		part, after, closed := strings.Cut(s, "'")
		if !closed {
			return "", "", fmt.Errorf("a literal without an end")
		}
		b.WriteString(part)
		if !strings.HasPrefix(after, "'") {
			return b.String(), after, nil
		}
		b.WriteByte('\'')
		s = after[1:]
	}
}
