// Package pgversion knows what depends on the version of Postgres in more than one place.
package pgversion

// decodesByNeed is the first version whose wal_level is a floor: with replica, the first
// logical slot switches logical decoding on, and losing the last one switches it off.
// Source: src/backend/replication/logical/logicalctl.c (read, not run: there is no server
// of 19 yet that the tests could start).
const decodesByNeed = 190000

// Decodes reports whether a server of that version, as server_version_num has it, has or
// makes logical decoding with that wal_level.
func Decodes(version int, walLevel string) bool {
	return walLevel == "logical" || walLevel == "replica" && version >= decodesByNeed
}
