package chaos

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
)

// oracle is an independent slot of test_decoding. It is read where no fault can
// meet it: when the load has ended, and before WAL is taken away.
type oracle struct {
	slot    string
	decoded transactions
}

// oracleChunk bounds what the server gathers for one answer, in changes.
const oracleChunk = 20_000

func (o *oracle) create(ctx context.Context, conn *pgx.Conn) error {
	_, err := conn.Exec(ctx, `select pg_create_logical_replication_slot($1, 'test_decoding')`, o.slot)
	return err
}

// read decodes what was committed since the slot was made, or last read. Where
// it fails, what it has decoded may be gone from the slot.
func (o *oracle) read(ctx context.Context, conn *pgx.Conn) error {
	for {
		changes, err := o.chunk(ctx, conn)
		if err != nil {
			return fmt.Errorf("read the oracle's slot: %w", err)
		}
		if changes == 0 {
			return nil
		}
	}
}

// chunk decodes some whole transactions and returns how many lines they had.
func (o *oracle) chunk(ctx context.Context, conn *pgx.Conn) (lines int, err error) {
	rows, err := conn.Query(ctx, `select lsn::text, case when data like 'table public.events: INSERT:%' or data like 'COMMIT%'
			or data ~ '^message: transactional: 1 prefix: outbox_relay:[0-9]+,' then data else '' end
		from pg_logical_slot_get_changes($1, null, $2, 'include-xids', '0', 'skip-empty-xacts', '1')`, o.slot, oracleChunk)
	if err != nil {
		return 0, err
	}
	var lsn, data string
	_, err = pgx.ForEachRow(rows, []any{&lsn, &data}, func() error {
		lines++
		return o.decoded.line(lsn, data)
	})
	return lines, err
}

// transactions gathers events and wishes from the lines of test_decoding.
type transactions struct {
	events []event
	wishes []wish
	open   struct{ events, wishes int } // how many of the last ones have no commit yet
}

// line takes one line. That of a COMMIT has the end of the commit record as its
// LSN (contrib/test_decoding; reorderbuffer's commit callback writes at end_lsn).
func (t *transactions) line(at, data string) error {
	lsn, err := pglogrepl.ParseLSN(at)
	if err != nil {
		return err
	}
	switch {
	case strings.HasPrefix(data, "COMMIT"):
		t.commit(lsn)
	case strings.HasPrefix(data, "table public.events: INSERT:"):
		columns, err := columnsOf(strings.TrimPrefix(data, "table public.events: INSERT:"))
		if err != nil {
			return fmt.Errorf("%w in %q", err, data)
		}
		t.events = append(t.events, event{id: columns["id"], body: digestOf([]byte(columns["payload"])), inserted: lsn,
			order: len(t.events) + len(t.wishes), rejected: columns["headers"] == illegalHeaders})
		t.open.events++
	case strings.HasPrefix(data, "message:"):
		_, signed, _ := strings.Cut(data, " content:")
		_, content, _ := strings.Cut(signed, " ") // behind the signature
		return t.wish(content)
	}
	return nil
}

func (t *transactions) commit(end pglogrepl.LSN) {
	for i := len(t.events) - t.open.events; i < len(t.events); i++ {
		t.events[i].end = end
	}
	for i := len(t.wishes) - t.open.wishes; i < len(t.wishes); i++ {
		t.wishes[i].end = end
	}
	t.open.events, t.open.wishes = 0, 0
}

// wish takes the content of a request.
func (t *transactions) wish(content string) error {
	var request struct {
		Retry  []struct{ ID string }
		Replay string
		IDs    []string
	}
	if err := json.Unmarshal([]byte(content), &request); err != nil {
		return fmt.Errorf("%w in request %q", err, content)
	}
	for _, row := range request.Retry {
		request.IDs = append(request.IDs, row.ID)
	}
	for _, id := range request.IDs {
		t.wishes = append(t.wishes, wish{id: id, run: request.Replay, order: len(t.events) + len(t.wishes)})
		t.open.wishes++
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
