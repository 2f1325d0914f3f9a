package dsn

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/testenv"
)

const canary = "s3cr3t-canary"

// pgx blanks out most passwords in its errors; none of these may get through.
func TestPostgresURLNeverShown(t *testing.T) {
	t.Parallel()
	for _, url := range []string{
		canary,
		"postgres://u:" + canary + "@h:port/db",
		"postgres://u:x/" + canary + "@h/db",
		"postgres://u:" + canary + "/y?z=1@h:99999999/db",
		"postgres://u:#" + canary + "@h:x/db",
		"postgres://u:" + canary + "%zz@h/db",
		"postgres://u:p@h:" + canary + "/db?password=" + canary,
		"postgres://h/db?password=" + canary + "&sslmode=" + canary,
		"postgres://h/db?sslmode=wrong&password=%zz" + canary,
		"postgresql:/u:" + canary + "@h/db",
		"Postgres://u:" + canary + "@h/db",
		"host=h password=" + canary + " port=x",
		"host=h password=one\\ " + canary + " port=x",
		"host=h password=one " + canary + " port=x",
		"host=h password='it\\'s " + canary + "' port=x",
		"host=h password='" + canary,
		"host=h PASSWORD = " + canary + " sslmode=" + canary,
		"host=h password=p connect_timeout=" + canary,
		"u:" + canary + "@tcp(h:5432)/db",
		"host=h password=\xff" + canary + " sslmode=x",
	} {
		_, err := Parse(url)
		if err == nil {
			t.Errorf("%q: no fault", url)
			continue
		}
		for unwrapped := err; unwrapped != nil; unwrapped = errors.Unwrap(unwrapped) {
			if text := fmt.Sprintf("%v %+v %#v", unwrapped, unwrapped, unwrapped); strings.Contains(text, "s3cr") || strings.Contains(text, "nary") {
				t.Errorf("%q: shown in %s", url, text)
			}
		}
	}
}

// A part of the password in the place of host, port, database or parameter would
// be shown by the errors of a dial and of the server.
func TestPostgresURLWithPasswordElsewhere(t *testing.T) {
	t.Parallel()
	for _, url := range []string{
		"postgres://u:p@" + canary + "@h:5432/db",
		"postgres://u:p@" + canary + "@a:5432,b:5433/db",
		"postgres://u:p@a,u:" + canary + "@b/db",
		"postgres://u:12/" + canary + "@h/db",
		"postgres://u:p@12/" + canary + "@h/db",
		"postgres://u:p@12?x=" + canary + "@h/db",
		"postgres://u:1/2?x=" + canary + "@h/db",
		"postgres://h:5432?password=p@" + canary,
		"postgres://u:p@" + canary + "#x@h/db",
		"host=u:" + canary + "@h dbname=db",
		"host=a,u:" + canary + "@h dbname=db",
		"host=h password=one " + canary + " port=5432",
	} {
		_, err := Parse(url)
		if err == nil {
			t.Errorf("%q: no fault", url)
			continue
		}
		if s := err.Error(); strings.Contains(s, "s3cr") || strings.Contains(s, "nary") || !strings.Contains(s, "%XX") {
			t.Errorf("%q: %s", url, s)
		}
	}
	for _, url := range []string{
		"postgres://u:p%40ss@h/db", "postgres://u:p@a:1,b:2/db%40x?application_name=x",
		"postgres://u:12?x@h/db", "postgres://u:12#x@h/db", // as libpq reads them
		"postgres://h/db?user=u@server&password=p@ss", "postgres://u@%2Ftmp/db",
		"host=h user=u@server password=p@ss dbname=db", "host=h password='a b' port=5432",
	} {
		if _, err := Parse(url); err != nil {
			t.Errorf("%q: %s", url, err)
		}
	}
}

// Parameters are settings of Postgres, or left out, or refused by name; and settings have
// the case that Postgres gives them, so that what the relay pins replaces them.
func TestParameters(t *testing.T) {
	t.Parallel()
	for parameter, want := range map[string]string{
		"gssencmode=disable": "map[client_encoding:UTF8]", "replication=database": "map[client_encoding:UTF8]", "keepalives_idle=5": "map[client_encoding:UTF8]",
		"client_encoding=LATIN1": "map[client_encoding:UTF8]",
		"timezone=Europe/Berlin": "map[TimeZone:Europe/Berlin client_encoding:UTF8]", "SEARCH_PATH=app": "map[client_encoding:UTF8 search_path:app]",
		"options=-c%20work_mem%3D5MB": "map[client_encoding:UTF8 options:-c work_mem=5MB]", "app.tenant=x": "map[app.tenant:x client_encoding:UTF8]", "role=writer": "map[client_encoding:UTF8 role:writer]",
		"schema=shop":        "has parameter schema, which the relay can't obey: take it out (name the schema in OUTBOX_TABLE)",
		"pgbouncer=true":     "has parameter pgbouncer, which the relay can't obey: take it out",
		"gssencmode=require": "has parameter gssencmode, which the relay can't obey: take it out (GSS encryption is not supported, use sslmode)",
		"colour=blue":        "has parameter colour, which is no setting of Postgres 15 to 18: take it out; a setting of a newer one goes into options (-c colour=…)",
		"password=a&colour=": "has a parameter that is no setting of Postgres and may be a part of the password, so that it is not shown: take it out, or write special characters of the password as %XX in a URL, and put it in single quotes elsewhere",
	} {
		got := ""
		if config, err := Parse("postgres://relay:p@db/shop?" + parameter); err != nil {
			got = err.Error()
		} else {
			got = fmt.Sprint(config.RuntimeParams)
		}
		if got != want {
			t.Errorf("%s: %s, want %s", parameter, got, want)
		}
	}
}

// The list has every setting of the server that a session can begin with.
func TestSettingsAreKnown(t *testing.T) {
	t.Parallel()
	conn, err := pgx.Connect(t.Context(), testenv.Database(t, testenv.Postgres(t)))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	rows, err := conn.Query(t.Context(), `select name from pg_settings
		where context in ('user', 'superuser', 'backend', 'superuser-backend') and name not like '%.%'`)
	if err != nil {
		t.Fatal(err)
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil || len(names) == 0 {
		t.Fatal(len(names), err)
	}
	for _, name := range names {
		if settings[strings.ToLower(name)] != name {
			t.Errorf("%s is missing from settings.txt", name)
		}
	}
}
